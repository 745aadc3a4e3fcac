"""The second system on real photographs: ODIR-5K at 128 px, judges from ImageNet weights; GPU, or hours on a CPU.

Put images and captions.csv in <root>/data, split them with ddpo_pytorch.data.fundus, and make rating sets from
the training and the validation table (docs/fundus.md). Then run the stages in this order:

    train_sd.py :train_vae, :finetune_sd  train_rlhf.py :train_rlhf, :train_rlhf_held_out  improve.py :improve
    eval.py :eval_base, :eval_improved  extract_dataset_latents.py :real_images  metric.py :evaluate_metric

Experiments that are not defined below are those of config/fundus.py with the paths and sizes of this file.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

fundus = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fundus.py"))))


def small(config):
    """Set all paths, and the sizes that all stages share."""
    config.base_log_path = "rl4med-out/odir128"
    root = config.get_ref("base_log_path")
    config.mixed_precision = "no"
    config.dataset.image_size = 128
    config.sd.update(image_size=128, gradient_checkpointing=False, gradient_accumulation_steps=1, text_tokens=48)
    config.sample.update(num_steps=20, guidance_scale=2.0)
    config.eval.batch_size = 64
    # pretrained features need neither many epochs nor the transformer's settings
    config.rlhf.update(text_encoder=root + "/sd", text_tokens=48, image_size=128, width=256)
    config.rlhf.update(backbone="tf_efficientnet_lite0", num_epochs=6, learning_rate=5e-4, second_learning_rate=1e-4)
    config.rlhf.wrong_captions = 0.4
    config.improve.held_out_images = 2  # for each of about 100 captions
    config.metric.update(inception="", alexnet="")
    return config


def train_vae():
    """Stage (i), first: the autoencoder, 128 px -> 16 x 16 x 16, on crops, with a perceptual loss."""
    config = small(fundus.finetune_sd())
    config.sd.update(stage="vae", vae_channels=(16, 32, 64, 64), vae_latent_channels=16, vae_attention=False)
    config.sd.update(vae_crop=64, perceptual_coef=0.1, perceptual_net="tf_efficientnet_lite0")
    config.sd.update(num_steps=10_000, batch_size=16, learning_rate=1e-3)
    return config


def finetune_sd():
    """Stage (i), second: a small BERT and a UNet from scratch."""
    config = small(fundus.finetune_sd())
    config.sd.update(stage="unet", unet_channels=(64, 128, 128), num_steps=20_000, batch_size=32, learning_rate=1e-3)
    return config


def train_rlhf_held_out():
    """Held-out judges, trained on other ratings, with another backbone."""
    config = small(fundus.train_rlhf_held_out())
    config.rlhf.backbone = "tf_efficientnet_lite1"
    return config


def ddpo():
    """One round's worth of DDPO: 256 samples per epoch in 2 updates."""
    config = small(fundus.ddpo())
    config.update(num_epochs=8, save_freq=8)
    config.sample.update(batch_size=64, num_batches_per_epoch=4)
    config.train.update(batch_size=64, gradient_accumulation_steps=2, gradient_checkpointing=False)
    config.train.update(lora_rank=16, learning_rate=2.5e-3)
    # a mean over 16 * 16 * 16 = 4,096 dimensions: 1e-4 * 16,384 / 4,096
    config.train.clip_range = 4e-4
    config.per_prompt_stat_tracking.min_count = 8
    return config


def improve():
    """Rounds of DDPO, with KID in ImageNet features as a further guard."""
    config = ddpo()
    config.improve.update(methods=("ddpo",), rounds=2, guard="tf_efficientnet_lite0")
    return config


def get_config(name=""):
    """Return an experiment of this file, or one of config/fundus.py at this file's scale."""
    inherited = {key: f for key, f in fundus.base.experiments(vars(fundus)).items() if not key.endswith("_mini")}
    return fundus.base.choose(globals(), name, inherited, small)
