"""Real dermoscopy: judges from ImageNet weights, and a small Stable Diffusion from scratch, on ISIC 2019 at 128 px.

For one GPU, or for about a day on a CPU. Put images in <root>/data/images and the official split tables in
<root>/data/splits, then run the stages in this order (the commands are in docs/training.md):

    train_isic_classifier.py (--num_classes 6 and 4)  train_sd.py :train_vae  train_isic_classifier.py (--through_vae)
    train_sd.py :finetune_sd  train.py  extract_dataset_latents.py  eval.py  metric.py

On a GPU, :train_vae_f4 takes the place of :train_vae, for thin hairs, and :train_vae_decoder sharpens it. Experiments
that are not defined below are those of config/dgx.py with the paths and sizes of this file.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

dgx = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("dgx.py"))))


def model_and_dataset_configs(config):
    """Set all paths, and the sizes that all stages share."""
    config.base_log_path = "rl4med-out/isic128"
    root = config.get_ref("base_log_path")
    config.update(mixed_precision="no", unet_path="")
    config.pretrained.model = root + "/sd"
    config.dataset.data_path = root + "/data/images"
    config.dataset.csv = root + "/data/splits/isic2019_val.csv"
    config.dataset.image_size = config.sd.image_size = 128
    config.reward_fn_kwargs.isic_classifier_reward.classifier = root + "/classifier/artifact_classifier_H6.safetensors"
    config.eval.classifier = root + "/classifier/artifact_classifier_H6.safetensors"
    config.held_out.classifier = root + "/classifier/artifact_classifier_H4.safetensors"
    config.metric.classifier = root + "/classifier/artifact_classifier_H4.safetensors"
    config.metric.real_path = root + "/real-images"
    config.sd.data_path = root + "/data/images"
    config.sample.num_steps = 20
    config.eval.update(num_samples_per_prompt=64, batch_size=64)
    return config


def train_vae():
    """Stage (i), first half: the autoencoder, 128 px -> 16 x 16 x 8: 24-fold compression."""
    config = model_and_dataset_configs(dgx.finetune_sd())
    config.sd.update(stage="vae", vae_channels=(32, 64, 64, 64), vae_latent_channels=8)
    # train on crops of a quarter of the area; attention would be trained for fewer positions than it is used with
    config.sd.update(vae_crop=64, vae_attention=False)
    config.sd.update(perceptual_coef=0.1, perceptual_net="tf_efficientnet_lite0")
    config.sd.update(num_steps=20_000, batch_size=16, learning_rate=1e-3)
    return config


def train_vae_f4():
    """An autoencoder that keeps thin hairs, 128 px -> 32 x 32 x 8: 6-fold compression."""
    config = train_vae()
    config.sd.output = config.get_ref("base_log_path") + "/autoencoder"
    config.sd.vae_channels = (32, 64, 64)
    return config


def train_vae_decoder():
    """Second phase: train the decoder of train_vae_f4 against a discriminator; saved where finetune_sd looks for it."""
    config = train_vae_f4()
    config.sd.vae = config.get_ref("base_log_path") + "/autoencoder/vae"
    config.sd.output = config.get_ref("base_log_path") + "/sd"
    config.sd.update(adversarial_coef=0.5, num_steps=10_000, learning_rate=3e-4)
    return config


def finetune_sd():
    """Stage (i), second half: text encoder and UNet, from scratch."""
    config = model_and_dataset_configs(dgx.finetune_sd())
    config.sd.update(stage="unet", unet_channels=(64, 128, 128), num_steps=20_000, batch_size=64, learning_rate=5e-4)
    return config


def preprocess_isic_real_data():
    """Real validation images, sorted by caption."""
    config = model_and_dataset_configs(dgx.preprocess_isic_real_data())
    config.logdir = config.get_ref("base_log_path") + "/real-images"
    return config


def prompt_image_alignment_classifier_isic():
    """Stage (ii) on one device."""
    config = model_and_dataset_configs(dgx.prompt_image_alignment_classifier_isic())
    config.update(num_epochs=50, save_freq=10)
    # 64 * 4 = 256 samples per epoch
    config.sample.update(batch_size=64, num_batches_per_epoch=4)
    # 64 * 2 = 128 samples per update, 256 / 128 = 2 updates per epoch
    config.train.update(batch_size=64, gradient_accumulation_steps=2, lora_rank=16, learning_rate=2e-3)
    # a mean over 8 * 16 * 16 = 2,048 dimensions: 1e-4 * 16,384 / 2,048. With train_vae_f4, 8,192 dimensions: 2e-4.
    config.train.clip_range = 8e-4
    return config


def prompt_image_alignment_classifier_isic_eval_rl():
    """Samples of the RL run."""
    config = model_and_dataset_configs(dgx.prompt_image_alignment_classifier_isic_eval_rl())
    config.load_from = config.get_ref("base_log_path") + "/logs/isic_classifier_reward_main"
    return config


def get_config(name=""):
    return dgx.at_scale_of(globals(), name)
