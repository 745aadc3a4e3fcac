#!/usr/bin/env bash
# Measure on one GPU, in about ten minutes, what the documentation wants to state: speed and utilisation of train.py at SD
# 1.5's size against plain loops, with and without each option; memory; and a minute of training that learns. Writes one
# JSON file. --simulate runs the same steps on a CPU, with tiny sizes and no options.
#
#     bash benchmarks/gpu.sh [--simulate] [FILE]
set -euo pipefail
SIMULATE=
if [ "${1:-}" = --simulate ]; then
    SIMULATE=1
    shift
fi
FILE=$(realpath -m "${1:-rl4med-out/gpu.json}")
cd "$(dirname "$0")/.."
FOLDER=$(mktemp -d)
trap 'rm -r "$FOLDER"' EXIT

SPEED="python benchmarks/training.py --size sd15 --updates 2 --batches 4 --turns 2"
LEARN="--config.mixed_precision=bf16 --config.num_epochs=8"
options=("" train.compile=True train.gradients_while_sampling=False train.gradient_checkpointing=True)
if [ "$SIMULATE" ]; then
    SPEED="python benchmarks/training.py --size mini --updates 2 --batches 1 --turns 1 --threads 1"
    SPEED+=" --set sample.num_steps=2 --set sample.batch_size=2 --set train.batch_size=1"
    LEARN="--config.num_epochs=1 --config.sample.num_steps=2 --config.sample.num_batches_per_epoch=1"
    LEARN+=" --config.train.gradient_accumulation_steps=1 --config.sample.batch_size=8 --config.train.batch_size=8"
    options=("")
fi

for option in "${options[@]}"; do
    echo "== train.py against plain loops${option:+, $option}"
    $SPEED ${option:+--set $option} | tail -n 1 > "$FOLDER/speed ${option:-default}.json"
done
if [ -z "$SIMULATE" ]; then
    echo "== memory"
    python benchmarks/memory_budget.py | tail -n 1 > "$FOLDER/memory.json"
fi
echo "== training"
python scripts/train.py --config config/mini.py:prompt_image_alignment_classifier_isic --config.logdir="$FOLDER/logs" \
    --config.run_name=run --config.log_with= --config.save_freq=100 $LEARN

python - "$FOLDER" "$FILE" <<'PYTHON'
import json
import sys
from pathlib import Path

folder, file = map(Path, sys.argv[1:])
found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
epochs = [json.loads(line) for line in (folder / "logs" / "run" / "metrics.jsonl").read_text().splitlines()]
names = ("reward_mean", "first_ratio_deviation", "second_ratio_deviation", "seconds", "peak_memory_gib")
found["training"] = [{name: epoch[name] for name in names if name in epoch} for epoch in epochs]
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(found, indent=1) + "\n")
print(f"written to {file}")
PYTHON
