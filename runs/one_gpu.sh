#!/usr/bin/env bash
# The paper's experiment on one GPU with GB=16, 24 (the default) or 80 GB, starting from the published classifiers and UNet
# of stage (i). First put the images in rl4med-out/data/ISIC_2019_Training_Input. Times are modelled for an A100 at 40 %
# of its peak; none has been measured.
#
#     GB=80 bash runs/one_gpu.sh
cd "$(dirname "$0")/.."
OUT=rl4med-out
source runs/common.sh

LAUNCH="accelerate launch --config_file config/accelerate/one_gpu.yaml"
DGX=config/dgx.py
ISIC=prompt_image_alignment_classifier_isic
RUN=$OUT/logs/isic_classifier_reward_main

stage download "?" python scripts/download.py
stage real-images "?" $LAUNCH scripts/extract_dataset_latents.py --config $DGX:preprocess_isic_real_data
stage ddpo "24 h, modelled" $LAUNCH scripts/train.py --config $DGX:${ISIC}_${GB:-24}gb
stage eval-sd "6 h, modelled" $LAUNCH scripts/eval.py --config $DGX:${ISIC}_eval
stage eval-rl "6 h, modelled" $LAUNCH scripts/eval.py --config $DGX:${ISIC}_eval_rl --config.load_from=$RUN
stage metric "?" $LAUNCH scripts/metric.py --config $DGX:evaluate_metric_rl --report
stage augment "?" $LAUNCH scripts/augment.py --data_path $OUT/data/ISIC_2019_Training_Input --samples SD=$OUT/samples/SD_samples --samples SD-RL=$OUT/samples/RL_samples
