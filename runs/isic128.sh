#!/usr/bin/env bash
# ISIC 2019 at 128 px with a small Stable Diffusion from scratch, on one GPU or a patient CPU. Put the images in
# rl4med-out/isic128/data/images first. Measured times are of smaller settings on one CPU core (docs/results.md).
#
#     bash runs/isic128.sh
cd "$(dirname "$0")/.."
OUT=rl4med-out/isic128
source runs/common.sh

LAUNCH="accelerate launch --num_processes 1"
ISIC128=config/isic128.py
SPLITS=$OUT/data/splits
DATA="--data_path $OUT/data/images --train_csv $SPLITS/isic2019_train.csv --val_csv $SPLITS/isic2019_val.csv"
ISIC=prompt_image_alignment_classifier_isic
RUN=$OUT/logs/isic_classifier_reward_main

stage download "?" python scripts/download.py --root $OUT
stage classifier-H6 "?" $LAUNCH scripts/train_isic_classifier.py $DATA --num_classes 6 --seed 6 --checkpoint_dir $OUT/classifier
stage classifier-H4 "?" $LAUNCH scripts/train_isic_classifier.py $DATA --num_classes 4 --seed 4 --checkpoint_dir $OUT/classifier
stage autoencoder "74 min measured with 3,000 steps of 8" $LAUNCH scripts/train_sd.py --config $ISIC128:train_vae
stage unet "22 min measured with 2,200 steps of 32" $LAUNCH scripts/train_sd.py --config $ISIC128:finetune_sd
stage real-images "?" $LAUNCH scripts/extract_dataset_latents.py --config $ISIC128:preprocess_isic_real_data
stage ddpo "?" $LAUNCH scripts/train.py --config $ISIC128:$ISIC
stage eval-sd "?" $LAUNCH scripts/eval.py --config $ISIC128:${ISIC}_eval
stage eval-rl "?" $LAUNCH scripts/eval.py --config $ISIC128:${ISIC}_eval_rl --config.load_from=$RUN
stage metric "?" $LAUNCH scripts/metric.py --config $ISIC128:evaluate_metric_rl --report
stage augment "16 min measured with 1,000 images at 96 px" $LAUNCH scripts/augment.py $DATA --test_csv $SPLITS/isic2019_test.csv --samples SD=$OUT/samples/SD_samples --samples SD-RL=$OUT/samples/RL_samples --image_size 128 --output $OUT/augment
