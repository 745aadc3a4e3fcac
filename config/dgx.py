"""Paper scale: ISIC 2019 at 512 px, Stable Diffusion 1.5, four A100s; and the same experiment on one smaller GPU.

    accelerate launch scripts/train.py --config config/dgx.py:prompt_image_alignment_classifier_isic

Every experiment is a function below and states what differs from config/base.py.
"""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

base = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("base.py"))))


def model_and_dataset_configs(config):
    """Set all paths. They derive from base_log_path, so overriding that on the command line moves them all."""
    root = config.get_ref("base_log_path")
    published = root + "/published"
    # ISIC 2019 images, and the official split tables.
    config.dataset.data_path = root + "/data/ISIC_2019_Training_Input"
    config.dataset.csv = root + "/data/splits/isic2019_test.csv"
    config.sd.update(data_path=root + "/data/ISIC_2019_Training_Input", output=root + "/sd")
    config.sd.update(csv=root + "/data/splits/isic2019_train.csv", val_csv=root + "/data/splits/isic2019_val.csv")
    # the published UNet of stage (i), reward classifier and judge.
    config.unet_path = published + "/pretrained_unet.safetensors"
    config.reward_fn_kwargs.isic_classifier_reward.classifier = published + "/artifact_classifier_train_H6.pth"
    config.eval.classifier = published + "/artifact_classifier_train_H6.pth"
    config.held_out.classifier = published + "/artifact_classifier_train_H4.pth"
    config.metric.classifier = published + "/artifact_classifier_train_H4.pth"
    # real images and samples, in folders that metric.py compares.
    config.metric.update(real_path=root + "/real-images-test", output=root + "/metrics")
    return config


def finetune_sd():
    """Stage (i): the UNet of SD 1.5 learns ISIC."""
    config = model_and_dataset_configs(base.get_config())
    config.unet_path = ""
    config.sd.update(batch_size=16, num_steps=15_000)
    return config


def finetune_sd_24gb():
    """The same 64 images per step on one 24 GB GPU: 14.6 GiB (benchmarks/memory_budget.py). Needs bitsandbytes."""
    config = finetune_sd()
    # 4 * 16 = 64 images per step, 16 * 4 GPUs in finetune_sd
    config.sd.update(batch_size=4, gradient_accumulation_steps=16, gradient_checkpointing=True, use_8bit_adam=True)
    return config


def preprocess_isic_real_data():
    """Real test images, sorted by caption for metric.py, and their VAE latents."""
    config = model_and_dataset_configs(base.get_config())
    config.dataset.num_workers = 4
    config.logdir = config.get_ref("base_log_path") + "/real-images-test"
    return config


def prompt_image_alignment_classifier_isic():
    """Stage (ii) as published, on 4 GPUs."""
    config = model_and_dataset_configs(base.get_config())
    config.update(run_name="isic_classifier_reward_main", num_epochs=200, save_freq=1, num_checkpoint_limit=200)
    config.per_prompt_stat_tracking.buffer_size = 32
    # 8 * 8 * 4 GPUs = 256 samples per epoch
    config.sample.update(batch_size=8, num_batches_per_epoch=8)
    # 4 * 8 * 4 GPUs = 128 samples per update, (8 * 8) / (4 * 8) = 2 updates per epoch
    config.train.update(batch_size=4, gradient_accumulation_steps=8)
    return config


def _on_one_gpu(batch_size):
    """Return stage (ii) with the same 256 samples and 2 updates of 128 samples per epoch on one GPU.

    Memory below is estimated by benchmarks/memory_budget.py, without workspaces and fragmentation.
    """
    config = prompt_image_alignment_classifier_isic()
    config.sample.update(batch_size=batch_size, num_batches_per_epoch=256 // batch_size)
    config.train.update(batch_size=batch_size, gradient_accumulation_steps=128 // batch_size)
    return config


def prompt_image_alignment_classifier_isic_16gb():
    """4 * 64 = 256 samples per epoch, 4 * 32 = 128 samples per update; 7.9 GiB."""
    return _on_one_gpu(batch_size=4)


def prompt_image_alignment_classifier_isic_24gb():
    """8 * 32 = 256 samples per epoch, 8 * 16 = 128 samples per update; 14.1 GiB."""
    return _on_one_gpu(batch_size=8)


def prompt_image_alignment_classifier_isic_80gb():
    """32 * 8 = 256 samples per epoch, 32 * 4 = 128 samples per update; 51 GiB."""
    return _on_one_gpu(batch_size=32)


def prompt_image_alignment_classifier_isic_eval():
    """960 images per prompt from the base model (stage (i))."""
    config = prompt_image_alignment_classifier_isic()
    config.update(prompt_fn="isic_all_idx", seed=88)
    config.eval.update(num_samples_per_prompt=960, batch_size=20)
    config.logdir = config.get_ref("base_log_path") + "/samples/SD_samples"
    return config


def prompt_image_alignment_classifier_isic_eval_rl():
    """The same prompts and noise from the RL checkpoint."""
    config = prompt_image_alignment_classifier_isic_eval()
    config.load_from = config.get_ref("base_log_path") + "/published/rl4med-checkpoint50"
    config.logdir = config.get_ref("base_log_path") + "/samples/RL_samples"
    return config


def evaluate_metric_sd():
    """APR, FID and LPIPS of the base model's samples."""
    config = model_and_dataset_configs(base.get_config())
    config.metric.update(fake_path=config.get_ref("base_log_path") + "/samples/SD_samples", fake_name="SD")
    return config


def evaluate_metric_rl():
    """APR, FID and LPIPS of the RL samples and, if they exist, of the base model's."""
    config = model_and_dataset_configs(base.get_config())
    config.metric.fake_path = config.get_ref("base_log_path") + "/samples/RL_samples"
    config.metric.compare_path = config.get_ref("base_log_path") + "/samples/SD_samples"
    return config


def get_config(name=""):
    return base.choose(globals(), name)


def at_scale_of(module, name):
    """Return an experiment of `module`, or this file's with its paths and sizes, ignoring suffixes such as _16gb."""
    suffix = re.compile(r"_\d+gb$")
    inherited = {key: f for key, f in base.experiments(globals()).items() if not suffix.search(key)}
    return base.choose(module, suffix.sub("", name), inherited, module["model_and_dataset_configs"])
