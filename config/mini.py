"""The default experiments: the mini world, phantoms at 64 px on a laptop CPU, offline, in minutes.

    accelerate launch scripts/train.py --config config/mini.py:prompt_image_alignment_classifier_isic

The weights are in ddpo_pytorch/assets/mini; "make mini-weights" rebuilds them with the stages below. Experiments that
are not defined below are those of config/dgx.py with the paths and sizes of this file.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import ddpo_pytorch

dgx = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dgx.py"))))

ASSETS = str(Path(ddpo_pytorch.__file__).parent / "assets" / "mini")


def model_and_dataset_configs(config):
    """Set all paths, and the sizes that all stages share."""
    config.base_log_path = "rl4med-out/mini"
    root = config.get_ref("base_log_path")
    config.update(mixed_precision="no", unet_path="")
    config.pretrained.model = ASSETS + "/sd"
    config.dataset.data_path = root + "/data/images"
    config.dataset.csv = root + "/data/splits/phantom_test.csv"
    config.reward_fn_kwargs.isic_classifier_reward.classifier = ASSETS + "/artifact_classifier_H6.safetensors"
    config.eval.classifier = ASSETS + "/artifact_classifier_H6.safetensors"
    config.held_out.classifier = ASSETS + "/artifact_classifier_H4.safetensors"
    config.metric.classifier = ASSETS + "/artifact_classifier_H4.safetensors"
    config.dataset.update(image_size=64, num_workers=0)
    # metric networks would have to be downloaded
    config.metric.update(batch_size=64, real_path="", inception="", alexnet="")
    config.sd.data_path = root + "/data/images"
    config.sd.csv = root + "/data/splits/phantom_train.csv"
    config.sd.val_csv = root + "/data/splits/phantom_val.csv"
    config.sd.image_size = 64
    config.sample.num_steps = 10
    # a higher scale improves the base model as much as DDPO does, leaving DDPO little to learn (docs/log.md)
    config.sample.guidance_scale = 1.5
    config.eval.update(num_samples_per_prompt=16, batch_size=64)
    return config


def train_vae():
    """Stage (i), first half: the autoencoder, 64 px -> 16 x 16 x 8.

    On a balanced world: at ISIC's frequencies it would learn to leave out ink, and no UNet could bring it back.
    """
    config = model_and_dataset_configs(dgx.finetune_sd())
    balanced = config.get_ref("base_log_path") + "/balanced"
    config.sd.data_path = balanced + "/images"
    config.sd.csv = balanced + "/splits/phantom_train.csv"
    config.sd.val_csv = balanced + "/splits/phantom_val.csv"
    config.sd.update(stage="vae", vae_latent_channels=8, num_steps=3600, batch_size=16, learning_rate=2e-3)
    return config


def finetune_sd():
    """Stage (i), second half: text encoder and UNet, from scratch."""
    config = model_and_dataset_configs(dgx.finetune_sd())
    config.sd.update(stage="unet", num_steps=2800, batch_size=32, learning_rate=1e-3)
    return config


def prompt_image_alignment_classifier_isic():
    """Stage (ii)."""
    config = model_and_dataset_configs(dgx.prompt_image_alignment_classifier_isic())
    config.update(run_name="", num_epochs=8, save_freq=4)
    # a prompt gets 8 rewards in about one epoch
    config.per_prompt_stat_tracking.min_count = 8
    # 64 * 4 = 256 samples per epoch
    config.sample.update(batch_size=64, num_batches_per_epoch=4)
    # 64 * 2 = 128 samples per update, 256 / 128 = 2 updates per epoch
    config.train.update(batch_size=64, gradient_accumulation_steps=2)
    # the noisy half of the trajectory decides what an image shows; training the other only costs time and adds noise
    config.train.update(timestep_window=(0.0, 0.5), lora_rank=16, learning_rate=2.5e-3)
    # a mean over 8 * 16 * 16 = 2,048 dimensions: 1e-4 * 16,384 / 2,048
    config.train.clip_range = 8e-4
    return config


def prompt_image_alignment_classifier_isic_eval_rl():
    """Samples of a run of train.py: give --config.load_from=rl4med-out/mini/logs/<run>."""
    config = model_and_dataset_configs(dgx.prompt_image_alignment_classifier_isic_eval_rl())
    config.load_from = config.get_ref("base_log_path") + "/logs"
    return config


def get_config(name=""):
    return dgx.at_scale_of(globals(), name)
