"""Every setting of every script, with its default, unit and interactions. This file is the only home of defaults, with
base_sd.py (the block `sd`, stage (i)) and base_fundus.py (what only the fundus system has), which it takes in.

Experiments are functions in the other files of this folder and state differences only:
`--config config/dgx.py:prompt_image_alignment_classifier_isic`. The file chooses the scale, the name the experiment.
Any field can be overridden on the command line (`--config.train.learning_rate=1e-4`); a field that does not exist here
is an error.
"""

import inspect
import runpy
from pathlib import Path

import ml_collections

from ddpo_pytorch.utils.cli import Configuration, KeywordArguments, OptionalBlock

add_sd = runpy.run_path(str(Path(__file__).with_name("base_sd.py")))["add_sd"]
add_fundus = runpy.run_path(str(Path(__file__).with_name("base_fundus.py")))["add_fundus"]


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """Return the defaults. `name` is accepted so that `config/base.py` can stand where an experiment file does."""
    if name:
        raise ValueError(
            f"config/base.py holds no experiments, got {name!r}; use config/dgx.py:{name} or config/mini.py:{name}"
        )
    config = Configuration()

    ###### General ######
    # root of everything read and written; every other path below is derived from it, so overriding it moves them all.
    # Paths are relative to the folder a command is run from; "~" is your home folder; an empty output is refused.
    config.base_log_path = "rl4med-out"
    # name of the run, i.e. of its folder under logdir. Empty: date and time.
    config.run_name = ""
    # all randomness (prompts, noise, shuffles, LoRA init) is a function of (seed, epoch, sample index).
    config.seed = 42
    # folder that holds run folders (train.py), or the one to write into (eval.py, extract_dataset_latents.py).
    config.logdir = config.get_ref("base_log_path") + "/logs"
    # number of RL epochs. One epoch is one round of sampling followed by training on those samples.
    config.num_epochs = 100
    # epochs between checkpoints (and fixed-seed sample grids).
    config.save_freq = 20
    # checkpoints kept in a run folder; older ones are removed after a newer one is complete.
    config.num_checkpoint_limit = 5
    # "fp16", "bf16" or "no". Frozen weights are held in this type; trained weights and log-probs stay in float32.
    config.mixed_precision = "fp16"
    # TF32 matrix products on Ampere and later GPUs.
    config.allow_tf32 = True
    # run folder or checkpoint folder to continue from; the newest checkpoint of a run folder is taken.
    config.resume_from = ""
    # LoRA adapters on the UNet (True) or all UNet weights (False).
    config.use_lora = True
    # "auto": Weights & Biases, online only when a key is set, otherwise offline; never asks. "disabled": not at all.
    # The run's metrics.jsonl is written either way.
    config.wandb = "auto"
    config.wandb_project = "rl4med-ddpo"
    # seconds that a process waits for the others before it takes them for lost: a day, as one may work alone for hours
    # (decoding images, downloading, a slow reward). On GPUs NCCL aborts the process when this is over.
    config.process_timeout = 24 * 3600.0
    # progress bars are shown on a terminal only; False hides them there too.
    config.progress = True

    ###### Pretrained model ######
    config.pretrained = pretrained = ml_collections.ConfigDict()
    # Stable Diffusion in diffusers format: a local folder, or a Hugging Face id. ("runwayml/stable-diffusion-v1-5",
    # which the official configuration names, left the hub; this is its mirror.)
    pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pretrained.revision = "main"
    # UNet state dict in diffusers names (safetensors) that replaces the pretrained UNet: the outcome of stage (i).
    # Empty: keep the pretrained UNet.
    config.unet_path = ""
    # LoRA or UNet weights to evaluate (eval.py, generate.py) or to start training from (train.py, with adapters of the
    # rank and targets below): a run folder, a checkpoint folder or a weight file. Empty: none, i.e. the base model.
    config.load_from = ""

    ###### Sampling ######
    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 50  # of denoising
    # "ddim", or in eval.py also "dpm++": DPM-Solver++ of second order (2M), deterministic, good in 15 to 25 steps.
    sample.scheduler = "ddim"
    # DDIM eta in [0, 1]: share of DDPM noise at each step. Training needs eta > 0: without noise there is no policy.
    sample.eta = 1.0
    # classifier-free guidance weight; 1.0 or less switches guidance off.
    sample.guidance_scale = 5.0
    # images per process and batch (but see train.gradients_while_sampling).
    sample.batch_size = 1
    # batches per process and epoch. batch_size * num_batches_per_epoch * processes = samples an epoch (the README's M).
    sample.num_batches_per_epoch = 2
    # consecutive samples that share a prompt (algorithm 1: M images per prompt). 1 draws a prompt for every sample, as
    # the official code does. Must divide batch_size * num_batches_per_epoch.
    sample.images_per_prompt = 1

    ###### Training ######
    config.train = train = ml_collections.ConfigDict()
    # samples per process in one forward and backward pass. Must divide sample.batch_size * num_batches_per_epoch.
    train.batch_size = 1
    # bitsandbytes' 8-bit Adam (needs that package and a GPU).
    train.use_8bit_adam = False
    train.learning_rate = 3e-4
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    # train batches per optimizer update. One update averages over batch_size * gradient_accumulation_steps * processes
    # samples and all of their trained timesteps.
    train.gradient_accumulation_steps = 1
    # timesteps of a sample in one forward and backward pass, which then has batch_size * timesteps_per_forward rows
    # (twice with guidance). The same gradients up to rounding; faster where small batches leave the device idle, and
    # more memory. Must divide the number of timesteps trained on.
    train.timesteps_per_forward = 1
    # updates whose loss or gradient is not finite are left out; so many in a row end the run.
    train.max_skipped_updates = 10
    # gradient norm above which gradients are scaled down.
    train.max_grad_norm = 1.0
    # passes over one epoch's samples.
    train.num_inner_epochs = 1
    # guided noise prediction in the update. Must be on when sample.guidance_scale > 1: samples scored by another policy
    # than the one that drew them have meaningless ratios.
    train.cfg = True
    # advantages are clipped to [-adv_clip_max, adv_clip_max].
    train.adv_clip_max = 5.0
    # PPO clip range for the ratio. Log-probs are *means* over latent dimensions D, so 1e-4 at D = 16,384 (512 px) clips
    # at +-1.64 nats of the true log-ratio; the same at D = 1,024 is 1.6e-3.
    train.clip_range = 1e-4
    # share of a trajectory's timesteps trained on, drawn anew for each sample.
    train.timestep_fraction = 1.0
    # part of the trajectory that timesteps are drawn from, 0 = noise, 1 = image. (0.0, 1.0) is all of it.
    train.timestep_window = (0.0, 1.0)
    # recompute activations in the backward pass: less memory, about a third more time.
    train.gradient_checkpointing = False
    # take the gradients of an epoch's first update while sampling, where its ratio is 1: the same up to rounding, but
    # without the forward passes of its samples, which are drawn batch_size * timesteps_per_forward at once. Only where
    # LoRA of linear layers is trained on all timesteps of the window (timestep_fraction is 1), without kl_coef and
    # compile; elsewhere it changes nothing. Keeps 4 bytes for each adapter weight and sample of the update.
    train.gradients_while_sampling = True
    # torch.compile of the UNet's transformer blocks: minutes at the start (compiled code is kept between runs), less
    # time in each pass. On a CPU it takes the place of the UNet's division among cores.
    train.compile = False
    # LoRA rank; the scale alpha / rank is 1, as in the published checkpoint.
    train.lora_rank = 4
    # module name endings of the UNet that get an adapter.
    train.lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    # weight of the KL divergence to the base model (adapters off), added to the loss. Needs use_lora.
    train.kl_coef = 0.0
    # "per_prompt": running per-prompt statistics (below). "group": mean and standard deviation over this epoch's
    # samples of the same prompt (GRPO); wants sample.images_per_prompt > 1, since a sample that is the only one of its
    # prompt teaches nothing. "global": over all samples of the epoch.
    train.advantage = "per_prompt"

    ###### Stopping criterion of the paper ######
    config.early_stop = early_stop = ml_collections.ConfigDict()
    # stop after so many epochs in a row whose mean reward changed by less than the tolerance. 0: never, as officially.
    early_stop.patience = 0
    early_stop.tolerance = 1e-3

    ###### Held-out evaluation during training (train.py) ######
    config.held_out = ml_collections.ConfigDict()
    # epochs between evaluations of all prompts of prompt_fn at fixed noise, the first before training; 0: none. Each
    # draws images_per_prompt * prompts images (8 * 32 = 256). The best checkpoint by APR is kept in <run>/best.
    config.held_out.every = 0
    config.held_out.images_per_prompt = 8
    # the H=4 judge; refused when it gives the reward, too.
    config.held_out.classifier = ""
    # stop after this many evaluations in a row whose APR is below the best by more than the tolerance (an APR near 1/2
    # of 256 images has a standard error of 0.03): the reward is hacked where it rises meanwhile, else the policy has
    # collapsed. 0 never stops.
    config.held_out.patience = 0
    config.held_out.tolerance = 0.05

    ###### Prompts ######
    # name of a function in ddpo_pytorch.prompts.
    config.prompt_fn = "isic_all"
    config.prompt_fn_kwargs = prompt_fn_kwargs = KeywordArguments()
    # its keyword arguments; None is not passed on. from_file reads lines [low, high) of path, fundus_table the captions
    # of the table at path. Those of your own function can be set without being named here.
    prompt_fn_kwargs.path = ml_collections.config_dict.placeholder(str)
    prompt_fn_kwargs.low = ml_collections.config_dict.placeholder(int)
    prompt_fn_kwargs.high = ml_collections.config_dict.placeholder(int)

    ###### Rewards ######
    # name of a function in ddpo_pytorch.rewards, or a weighted sum such as
    # "isic_classifier_reward:1.0,jpeg_compressibility:0.1".
    config.reward_fn = "isic_classifier_reward"
    # keyword arguments by reward name, e.g. reward_fn_kwargs.isic_classifier_reward.classifier. Those of your own
    # reward can be set without being named here.
    config.reward_fn_kwargs = KeywordArguments()
    # folder of train_rlhf.py with Selector and Policy.
    config.reward_fn_kwargs.fundus_alignment.judges = config.get_ref("base_log_path") + "/rlhf"
    # H=6 attribute classifier that gives the reward.
    config.reward_fn_kwargs.isic_classifier_reward.classifier = (
        config.get_ref("base_log_path") + "/published/artifact_classifier_train_H6.pth"
    )

    ###### Per-prompt statistics ######
    # None: advantages are taken over the whole batch, as with train.advantage="global".
    config.per_prompt_stat_tracking = OptionalBlock()
    # rewards remembered for each prompt, 2 or more.
    config.per_prompt_stat_tracking.buffer_size = 16
    # rewards a prompt needs before its own mean and standard deviation are used instead of the batch's: 2 to
    # buffer_size.
    config.per_prompt_stat_tracking.min_count = 16

    ###### Data set ######
    config.dataset = dataset = ml_collections.ConfigDict()
    # folder of <image>.jpg files (any suffix, with or without _downsampled), and the split table.
    dataset.data_path = ""
    dataset.csv = ""
    dataset.kind = "isic"  # or "fundus": which tables are read (ddpo_pytorch/data/isic.py, fundus.py)
    # side in pixels of the squares that images become, and how: "stretch" (aspect ratio not kept, as in the paper),
    # "crop" (the middle), "pad" (black bars) or "fov" (a fundus photograph's circle, padded).
    dataset.image_size = 512
    dataset.resize = "stretch"
    # rows used; 0 is all of them. skip_broken leaves out damaged images, with a warning, instead of stopping at them.
    dataset.limit = 0
    dataset.skip_broken = False
    dataset.num_workers = 0  # image decoding processes of each process; 0 decodes in the process itself

    ###### Evaluation (eval.py) ######
    config.eval = evaluation = ml_collections.ConfigDict()
    # prompts, one image folder each: "('caption one','caption two')". (): all of prompt_fn, which can be a file.
    evaluation.prompts = ()
    evaluation.num_samples_per_prompt = 960  # of each prompt
    # images that go through the networks together on a GPU; on a CPU that number follows from the model's size alone.
    evaluation.batch_size = 20
    # "png" (lossless), or "jpg": quality 95 without chroma subsampling (4:4:4).
    evaluation.image_format = "png"
    # H-head classifier that scores the samples on the fly for image_log.json. Empty: none.
    evaluation.classifier = ""

    ###### Metrics (metric.py) ######
    config.metric = metric = ml_collections.ConfigDict()
    # sample folders: real images, generated images, and optionally a second generated set for a row above it.
    metric.real_path = ""
    metric.fake_path = ""
    metric.compare_path = ""
    metric.fake_name = "SD+RL"  # titles of fake_path and compare_path
    metric.compare_name = "SD"
    # in place of these, any number of folders, "SD=DIR,SD+RL=DIR": the others are compared with the first. Several
    # folders of one name are generation seeds of one model; from three on they give its interval.
    metric.folders = ""
    # folder of training images (at any depth): how near do samples come to them, by the measure of real_path's images?
    metric.train_path = ""
    # the H=4 judge, which took no part in training ("" where metric.judges judge), and others: "H6=FILE,NAME=FILE".
    metric.classifier = ""
    metric.more_judges = ""
    # folders for metrics.json and the tables, and for what networks say about images (by content; may be deleted).
    metric.output = ""
    metric.cache_dir = config.get_ref("base_log_path") + "/cache/metrics"
    metric.batch_size = 256  # images per process and forward pass
    metric.prompts = ()  # captions to evaluate; () is all 32
    # feature networks of FID, KID and the like: "inception", "dinov2", "judge" (pooled features of metric.classifier,
    # or of the Selector).
    metric.extractors = ("inception", "judge")
    # "exact", or "compat": x * 256 wrapped to 8 bits and sets of different prompt mixes, as behind the published FIDs.
    metric.fid = "exact"
    # weights of Inception (torch-fidelity's .pth) for FID, AlexNet (torchvision's .pth) for LPIPS, and DINOv2 (timm's
    # .safetensors). "auto": the torch hub cache. "download": that, or fetched. "": left out.
    metric.inception = "auto"
    metric.alexnet = "auto"
    metric.dinov2 = "auto"
    # run folders of train.py whose curves the report shows: "NAME=DIR,NAME=DIR".
    metric.logs = ""

    add_sd(config)
    add_fundus(config)
    return config.lock()


def choose(module: dict, name: str) -> ml_collections.ConfigDict:
    """The configuration that experiment `name`, a public function without arguments in the file `module`, returns."""
    own = {key: f for key, f in module.items() if inspect.isfunction(f) and f.__module__ == module["__name__"]}
    experiments = [key for key, f in own.items() if key[0] != "_" and not inspect.signature(f).parameters]
    if name not in experiments:
        raise ValueError(f"experiment {name!r} is unknown; {module['__file__']} has {', '.join(experiments)}")
    return module[name]()
