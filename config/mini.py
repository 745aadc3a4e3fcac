"""The embedded default: the phantom world at 64 px on a laptop CPU, offline, in minutes.

    accelerate launch scripts/train.py --config config/mini.py:prompt_image_alignment_classifier_isic

The weights are in ddpo_pytorch/assets/mini; "make mini-weights" rebuilds them with the stages below. Every experiment
is the one of config/dgx.py with other sizes.
"""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("dgx", Path(__file__).with_name("dgx.py"))
dgx = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(dgx)

ASSETS = str(Path(importlib.util.find_spec("ddpo_pytorch").origin).parent / "assets" / "mini")


def model_and_dataset_configs(config):
    """All paths, and the sizes that every stage shares."""
    config.base_log_path = "rl4med-out/mini"
    root = config.get_ref("base_log_path")
    config.mixed_precision = "no"
    config.pretrained.model = ASSETS + "/sd"
    config.unet_path = ""
    config.dataset.data_path = root + "/data/images"
    config.dataset.csv = root + "/data/splits/phantom_test.csv"
    config.dataset.image_size = 64
    config.reward_fn_kwargs.isic_classifier_reward.classifier = ASSETS + "/artifact_classifier_H6.safetensors"
    config.eval.classifier = ASSETS + "/artifact_classifier_H6.safetensors"
    config.metric.classifier = ASSETS + "/artifact_classifier_H4.safetensors"
    # no metric network may be downloaded here
    config.metric.inception = ""
    config.metric.alexnet = ""
    config.sd.data_path = root + "/data/images"
    config.sd.csv = root + "/data/splits/phantom_train.csv"
    config.sd.image_size = 64
    config.sample.num_steps = 10
    config.sample.guidance_scale = 3.0
    return config


def train_vae():
    """Stage (i), first half: the autoencoder, 64 px -> 16 x 16 x 4."""
    config = model_and_dataset_configs(dgx.finetune_sd())
    config.sd.stage = "vae"
    config.sd.num_steps = 2000
    config.sd.batch_size = 16
    config.sd.learning_rate = 2e-3
    return config


def finetune_sd():
    """Stage (i), second half: text encoder and UNet, from nothing."""
    config = model_and_dataset_configs(dgx.finetune_sd())
    config.sd.stage = "unet"
    config.sd.num_steps = 3200
    config.sd.batch_size = 64
    config.sd.learning_rate = 1e-3
    return config


EXPERIMENTS = {f.__name__: f for f in (train_vae, finetune_sd)}


def get_config(name):
    return EXPERIMENTS[name]()
