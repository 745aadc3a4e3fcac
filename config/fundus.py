"""The second system: fundus photographs, Selector and Policy trained on expert ratings, rounds of improvement.

    python scripts/improve.py --config config/fundus.py:improve

Experiments without a suffix are for a GPU: SD 1.5 with BioMedBERT at 512 px on your own table (rl4med-out/fundus). With
the suffix _mini, each of them runs offline on fundus phantoms at 64 px on a CPU, in minutes ("make demo-fundus").
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import ddpo_pytorch

base = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("base.py"))))
ASSETS = Path(ddpo_pytorch.__file__).parent / "assets"


def _common(trained=False):
    """Return what all experiments share: paths, which derive from base_log_path; `trained`: finetune_sd's generator."""
    config = base.get_config()
    config.base_log_path = "rl4med-out/fundus"
    root = config.get_ref("base_log_path")
    # image folder, and the tables fundus_{train,val,test}.csv written by python -m ddpo_pytorch.data.fundus
    splits = root + "/data/splits"
    config.dataset.update(kind="fundus", resize="fov", data_path=root + "/data", csv=splits + "/fundus_test.csv")
    config.sd.update(kind="fundus", resize="fov", text_encoder="bert", data_path=root + "/data", output=root + "/sd")
    config.sd.update(csv=splits + "/fundus_train.csv", val_csv=splits + "/fundus_val.csv")
    config.rlhf.ratings = root + "/ratings/ratings.csv"
    # on real photographs at 64 px, a linear stem without warm-up reached a Spearman correlation of .57, this setup .92
    config.rlhf.update(stem="conv", warmup_steps=100)
    config.improve.update(held_out_judges=root + "/rlhf-held-out", data_path=root + "/data")
    # rounds are chosen on validation images; final results are measured on test images
    config.improve.update(csv=splits + "/fundus_train.csv", held_out_csv=splits + "/fundus_val.csv")
    config.prompt_fn = "fundus_table"
    config.prompt_fn_kwargs.path = splits + "/fundus_train.csv"
    config.reward_fn = "fundus_alignment"
    config.sample.guidance_scale = 7.5
    config.metric.update(judges=root + "/rlhf-held-out", quality=("legacy", "fov"))
    config.metric.update(real_path=root + "/real-images-test", output=root + "/metrics")
    if trained:
        config.pretrained.model = root + "/sd"
    return config


def finetune_sd():
    """Stage (i): SD 1.5's UNet with BioMedBERT in CLIP's place; 20,000 steps of 4 x 20 images (MINIM)."""
    config = _common()
    config.sd.update(num_steps=20_000, batch_size=20, gradient_accumulation_steps=4, gradient_checkpointing=True)
    return config


def train_rlhf():
    """Selector and Policy from expert ratings, in two stages."""
    return _common()


def train_rlhf_held_out():
    """Held-out Selector and Policy from other ratings, for measurements only."""
    config = _common()
    config.rlhf.ratings = config.get_ref("base_log_path") + "/ratings-held-out/ratings.csv"
    config.rlhf.output = config.get_ref("base_log_path") + "/rlhf-held-out"
    config.seed = 43
    return config


def generate():
    """Best-of-N images of every caption of the training table."""
    config = _common(trained=True)
    config.logdir = config.get_ref("base_log_path") + "/samples/best-of-n"
    return config


def generate_composed():
    """Best-of-N images of prompts composed from the findings of the generator's own training captions, balanced."""
    config = generate()
    config.prompt_fn = "composed"
    config.prompt_fn_kwargs.path = config.get_ref("base_log_path") + "/sd"
    config.logdir = config.get_ref("base_log_path") + "/samples/composed"
    return config


def improve():
    """Three rounds of DDPO; fine-tuning on what the judges chose made phantoms worse (docs/log.md)."""
    config = ddpo()
    config.improve.methods = ("ddpo",)
    return config


def ddpo():
    """Policy gradient on the judges' reward, [selector >= threshold] * policy."""
    config = _common(trained=True)
    config.update(num_epochs=50, save_freq=5)
    # 8 * 8 = 64 samples per epoch and process, 2 updates
    config.sample.update(batch_size=8, num_batches_per_epoch=8)
    config.train.update(batch_size=4, gradient_accumulation_steps=8, gradient_checkpointing=True)
    return config


def eval_base():
    """Samples of every caption of the test table from the generator before improvement."""
    config = _common(trained=True)
    config.prompt_fn_kwargs.path = config.dataset.get_ref("csv")
    config.eval.num_samples_per_prompt = 16
    config.logdir = config.get_ref("base_log_path") + "/samples/SD"
    return config


def eval_improved():
    """Samples of the same captions and noise after the best round."""
    config = eval_base()
    config.pretrained.model = config.get_ref("base_log_path") + "/improve/best"
    config.logdir = config.get_ref("base_log_path") + "/samples/RL"
    return config


def real_images():
    """The test photographs as a sample folder."""
    config = _common()
    config.pretrained.model = ""
    config.logdir = config.get_ref("base_log_path") + "/real-images-test"
    return config


def evaluate_metric():
    """Table 1, judges' scores, KID and diversity of real photographs, and of samples before and after improvement."""
    config = _common()
    root = config.get_ref("base_log_path")
    config.metric.update(compare_path=root + "/samples/SD", fake_path=root + "/samples/RL", fake_name="SD+RLHF")
    return config


def mini(config):
    """Set the sizes of phantoms at 64 px on a CPU; no metric networks, which would have to be downloaded."""
    config.base_log_path = "rl4med-out/fundus-mini"
    config.mixed_precision = "no"
    config.dataset.update(image_size=64, resize="stretch")
    config.sd.update(image_size=64, resize="stretch", text_tokens=24)
    config.sample.update(num_steps=10, guidance_scale=1.0)
    config.eval.batch_size = 64
    config.rlhf.text_encoder = config.get_ref("base_log_path") + "/sd"
    config.rlhf.autoencoder = config.get_ref("base_log_path") + "/sd"
    config.rlhf.update(text_tokens=24, image_size=64, width=96, heads=3, selector_layers=2, policy_layers=3)
    config.rlhf.update(dropout=0.0, num_epochs=10, learning_rate=1e-3, second_learning_rate=3e-4)
    config.rlhf.update(resize="stretch", warmup_steps=0)
    config.log_with = ""
    config.improve.update(images_per_prompt=8, held_out_images=32, num_steps=200, learning_rate=5e-4, ema_decay=0.95)
    config.metric.update(inception="", alexnet="", batch_size=64)
    return config


def train_vae_mini():
    """Stage (i), first: the skin phantoms' autoencoder, trained further on fundus phantoms."""
    config = mini(_common())
    config.sd.update(stage="vae", vae=str(ASSETS / "mini" / "sd" / "vae"))
    config.sd.update(num_steps=450, batch_size=16, learning_rate=1e-3)
    return config


def finetune_sd_mini():
    """Stage (i), second: a small BERT and a UNet from scratch."""
    config = mini(_common())
    config.sd.update(stage="unet", num_steps=1500, batch_size=32, learning_rate=1e-3)
    return config


def improve_mini():
    """Three rounds of DDPO."""
    config = ddpo_mini()
    config.improve.methods = ("ddpo",)
    return config


def ddpo_mini():
    """One round's worth of DDPO: 256 samples per epoch in 4 updates."""
    config = mini(ddpo())
    config.update(num_epochs=8, save_freq=8)
    config.sample.update(batch_size=64, num_batches_per_epoch=4)
    config.train.update(batch_size=64, gradient_accumulation_steps=1, gradient_checkpointing=False)
    # half of the steps, from the whole trajectory: early ones decide the content, late ones the sharpness
    config.train.update(timestep_fraction=0.5, lora_rank=16, learning_rate=2.5e-3)
    # twice what equals 1e-4 at D = 16,384, for latents of 8 * 16 * 16 = 2,048 dimensions
    config.train.clip_range = 1.6e-3
    config.per_prompt_stat_tracking.min_count = 8
    return config


def generate_mini():
    """Best-of-N images from the best round."""
    config = mini(generate())
    config.pretrained.model = config.get_ref("base_log_path") + "/improve/best"
    config.improve.images_per_prompt = 2
    return config


def get_config(name=""):
    """Return an experiment of this file; <name>_mini is <name> at the scale of `mini` unless it is defined above."""
    large = {f"{key}_mini": f for key, f in base.experiments(globals()).items() if not key.endswith("_mini")}
    return base.choose(globals(), name, large, mini)
