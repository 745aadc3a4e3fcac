#!/usr/bin/env bash
# The paper: ISIC 2019 at 512 px on one node with four A100s. First put the images in
# rl4med-out/data/ISIC_2019_Training_Input. Times are modelled for A100s at 40 % of their peak; none has been measured.
#
#     bash runs/paper.sh
cd "$(dirname "$0")/.."
OUT=rl4med-out
source runs/common.sh

LAUNCH="accelerate launch --config_file config/accelerate/one_node_4.yaml"
DGX=config/dgx.py
DATA="--data_path $OUT/data/ISIC_2019_Training_Input"
ISIC=prompt_image_alignment_classifier_isic
RUN=$OUT/logs/isic_classifier_reward_main

stage download "?" python scripts/download.py
# optional: these repeat the training of the reward classifier and the judge; the published ones are used below
stage classifier-H6 "?" $LAUNCH scripts/train_isic_classifier.py $DATA --num_classes 6 --batch_size 8
stage classifier-H4 "?" $LAUNCH scripts/train_isic_classifier.py $DATA --num_classes 4 --batch_size 8 --seed 4
# optional: stage (i), from SD 1.5; the published UNet is used below
stage finetune "1.3 h, modelled" $LAUNCH scripts/train_sd.py --config $DGX:finetune_sd
stage real-images "?" $LAUNCH scripts/extract_dataset_latents.py --config $DGX:preprocess_isic_real_data
stage ddpo "6 h, modelled" $LAUNCH scripts/train.py --config $DGX:$ISIC
stage eval-sd "1.4 h, modelled" $LAUNCH scripts/eval.py --config $DGX:${ISIC}_eval
stage eval-rl "1.4 h, modelled" $LAUNCH scripts/eval.py --config $DGX:${ISIC}_eval_rl --config.load_from=$RUN
stage metric "?" $LAUNCH scripts/metric.py --config $DGX:evaluate_metric_rl --report
stage augment "?" $LAUNCH scripts/augment.py $DATA --samples SD=$OUT/samples/SD_samples --samples SD-RL=$OUT/samples/RL_samples
