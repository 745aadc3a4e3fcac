#!/usr/bin/env bash
# The mini world on a CPU, offline, with the shipped generator and judges. Up to "metric", this took 8 minutes on two cores.
#
#     bash runs/mini.sh
cd "$(dirname "$0")/.."
OUT=rl4med-out/mini
source runs/common.sh

LAUNCH="accelerate launch --num_processes 1"
MINI=config/mini.py
SPLITS=$OUT/data/splits
ISIC=prompt_image_alignment_classifier_isic

stage world "seconds" python -m ddpo_pytorch.phantoms.skin --out $OUT/data
stage real-images "seconds" $LAUNCH scripts/extract_dataset_latents.py --config $MINI:preprocess_isic_real_data
stage ddpo "4 min, measured" $LAUNCH scripts/train.py --config $MINI:$ISIC --config.run_name=main
stage eval-sd "seconds" $LAUNCH scripts/eval.py --config $MINI:${ISIC}_eval
stage eval-rl "seconds" $LAUNCH scripts/eval.py --config $MINI:${ISIC}_eval_rl --config.load_from=$OUT/logs/main
stage metric "seconds" $LAUNCH scripts/metric.py --config $MINI:evaluate_metric_rl --config.metric.real_path=$OUT/real-images-test --report
stage augment "?" $LAUNCH scripts/augment.py --data_path $OUT/data/images --train_csv $SPLITS/phantom_train.csv --val_csv $SPLITS/phantom_val.csv --test_csv $SPLITS/phantom_test.csv --samples SD=$OUT/samples/SD_samples --samples SD-RL=$OUT/samples/RL_samples --arch tinynet_e --weights none --image_size 96 --num_epochs 12 --limit 1000 --output $OUT/augment
