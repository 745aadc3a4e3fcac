#!/usr/bin/env bash
# ISIC 2019 at 128 px with a small Stable Diffusion from scratch, on one GPU, or on a CPU in about a day. First put the
# images in rl4med-out/isic128/data/images. Times were measured with the settings of docs/results.md, on CPU cores
# with AVX-512.
#
#     bash runs/isic128.sh
cd "$(dirname "$0")/.."
OUT=rl4med-out/isic128
source runs/common.sh

LAUNCH="accelerate launch --num_processes 1"
ISIC128=config/isic128.py
SPLITS=$OUT/data/splits
DATA="--data_path $OUT/data/images --val_csv $SPLITS/isic2019_val.csv"
JUDGE="$LAUNCH scripts/train_isic_classifier.py $DATA --image_size 160 --quarter_turns"
PHOTOGRAPHS="--ema_decay 0.998 --num_epochs 8 --checkpoint_dir $OUT/photographs"
# half of each batch passes through the autoencoder, like the images to be judged
BOTH="--learning_rate 3e-4 --ema_decay 0.99 --num_epochs 4 --through_vae $OUT/sd --checkpoint_dir $OUT/classifier --checkpoint $OUT/photographs/artifact_classifier"
ISIC=prompt_image_alignment_classifier_isic
RUN=$OUT/logs/isic_classifier_reward_main

stage download "?" python scripts/download.py --root $OUT
# the judge shares neither backbone nor training images with the reward classifier
stage thirds "seconds" bash -ec "
awk 'NR % 3 != 0 || NR == 1' $SPLITS/isic2019_train.csv > $SPLITS/reward_train.csv
awk 'NR % 3 == 0 || NR == 1' $SPLITS/isic2019_train.csv > $SPLITS/judge_train.csv"
stage photographs-H6 "2 min on a core per epoch" $JUDGE $PHOTOGRAPHS --num_classes 6 --arch tf_efficientnet_lite0 --train_csv $SPLITS/reward_train.csv --seed 6 --learning_rate 3.5e-4 --batch_size 16
stage photographs-H4 "2.5 min on a core per epoch" $JUDGE $PHOTOGRAPHS --num_classes 4 --arch tf_efficientnet_lite1 --train_csv $SPLITS/judge_train.csv --seed 4 --learning_rate 5e-4
stage autoencoder "30 min on a core with 4,000 steps" $LAUNCH scripts/train_sd.py --config $ISIC128:train_vae
stage classifier-H6 "4 min on a core per epoch" $JUDGE ${BOTH}_H6.safetensors --num_classes 6 --train_csv $SPLITS/reward_train.csv --seed 6
stage classifier-H4 "2.5 min on a core per epoch" $JUDGE ${BOTH}_H4.safetensors --num_classes 4 --train_csv $SPLITS/judge_train.csv --seed 4
stage unet "55 min on a core with 5,000 steps of 32" $LAUNCH scripts/train_sd.py --config $ISIC128:finetune_sd
stage real-images "seconds" $LAUNCH scripts/extract_dataset_latents.py --config $ISIC128:preprocess_isic_real_data
stage ddpo "13 min on a core with 12 epochs" $LAUNCH scripts/train.py --config $ISIC128:$ISIC
stage eval-sd "8 min on a core with 48 images per caption" $LAUNCH scripts/eval.py --config $ISIC128:${ISIC}_eval
stage eval-rl "8 min on a core with 48 images per caption" $LAUNCH scripts/eval.py --config $ISIC128:${ISIC}_eval_rl --config.load_from=$RUN
stage metric "?" $LAUNCH scripts/metric.py --config $ISIC128:evaluate_metric_rl --report
stage augment "24 min on a core with 1,000 images" $LAUNCH scripts/augment.py $DATA --train_csv $SPLITS/isic2019_train.csv --test_csv $SPLITS/isic2019_test.csv --samples SD=$OUT/samples/SD_samples --samples SD-RL=$OUT/samples/RL_samples --image_size 128 --output $OUT/augment
