#!/bin/bash
# Run scripts/train.py on every GPU of a Slurm job. Submit from the repository root, in the active environment:
#     sbatch docs/slurm.sh --config config/dgx.py:prompt_image_alignment_classifier_isic --config.run_name=main
# A fixed run_name makes the command resume. Slurm resubmits it after a pre-emption or the loss of a node; ten minutes before
# the time limit the run saves and exits, and this script requeues the job.
#SBATCH --job-name=ddpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=ddpo-%j.log
set -euo pipefail

# override for another launch file, or where another job on the node already uses the port
export LAUNCH_CONFIG=${LAUNCH_CONFIG:-config/accelerate/multi_node.yaml}
export MAIN_PORT=${MAIN_PORT:-29500}
read -r MAIN_NODE < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_NODE

# One launcher per node; it starts one process per GPU. Slurm signals this shell only, and USR1 would kill a launcher: it
# ignores the signal, which is forwarded to its children, the processes of train.py.
srun --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    accelerate launch --config_file "$LAUNCH_CONFIG" --num_machines "$SLURM_NNODES" \
        --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_NODE" --main_process_port "$MAIN_PORT" scripts/train.py "$@" &
    launcher=$!
    trap "pkill -USR1 -P $launcher" USR1
    code=0
    while kill -0 $launcher 2>/dev/null; do # a signal interrupts wait
        code=0
        wait $launcher || code=$?
    done
    exit $code
' train "$@" &
step=$!

out_of_time=
trap 'out_of_time=1; kill -USR1 $step' USR1 # srun forwards it to the shell on each node
code=0
wait $step || code=$?
if [ -n "$out_of_time" ]; then # the signal interrupted wait, not the step
    code=0
    wait $step || code=$?
    [ $code -ne 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
