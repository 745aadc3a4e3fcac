# Stages of a pipeline, sourced by the scripts of this folder after they set OUT, the folder of its results.
#
#     stage NAME TIME COMMAND...
#
# runs a command unless that stage has finished before (OUT/stages/NAME exists). Rerun a script to resume it: finished
# stages are skipped, and the interrupted command resumes. Delete OUT/stages/NAME to repeat a stage. TIME is measured,
# modelled as in docs/scaling.md, or "?". DRY_RUN=1 only prints the commands.
set -euo pipefail

stage() {
    local name=$1 time=$2 mark=$OUT/stages/$1
    shift 2
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$*"
    elif [ -e "$mark" ]; then
        echo "== $name: finished before"
    else
        echo "== $name ($time)"
        "$@"
        mkdir -p "${mark%/*}"
        touch "$mark"
    fi
}
