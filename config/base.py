"""Every setting of every script: default, unit, allowed values and interactions. The only place for defaults.

Experiments are functions in the other files of this folder and state differences only:
`--config config/dgx.py:prompt_image_alignment_classifier_isic`. The file sets the scale, the name the experiment.
Any field can be overridden on the command line (`--config.train.learning_rate=1e-4`); unknown fields are errors.
"""

import inspect
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpo_pytorch.utils.cli import Configuration, KeywordArguments, OptionalBlock


def get_config(name: str = "") -> ConfigDict:
    """Return the defaults. `name` exists only for the error message, since experiments are in other files."""
    if name:
        raise ValueError(f"config/base.py has no experiment {name}; use config/dgx.py:{name} or config/mini.py:{name}")
    config = Configuration()

    ###### General ######
    # root of everything read and written, from which the other paths are derived. Paths are relative to the current
    # folder; "~" is the home folder; an empty output path is refused.
    config.base_log_path = "rl4med-out"
    root = config.get_ref("base_log_path")
    config.run_name = ""  # name of the run, i.e. of its folder under logdir. Empty: date and time
    config.seed = 42  # all randomness (prompts, noise, shuffles, LoRA init) is a function of (seed, epoch, sample)
    config.logdir = root + "/logs"  # parent of run folders (train.py), else the output folder
    config.num_epochs = 100  # RL epochs: rounds of sampling, each followed by training on those samples
    config.save_freq = 20  # epochs between checkpoints (and fixed-seed sample grids)
    # checkpoints kept in a run folder; older ones are removed after a newer one is complete.
    config.num_checkpoint_limit = 5
    config.mixed_precision = "fp16"  # or "bf16", "no": dtype of frozen weights; trained ones, log-probs stay in float32
    config.allow_tf32 = True  # TF32 matrix products on Ampere and later GPUs
    config.resume_from = ""  # checkpoint folder to resume from, or run folder, whose newest checkpoint is taken
    config.use_lora = True  # LoRA adapters on the UNet (True) or all UNet weights (False)
    # Accelerate's trackers besides metrics.jsonl: "wandb" (offline without a key), "wandb,tensorboard", ...; "": none.
    # log_images also sends sample grids there; off by default, since medical images should not leave the machine.
    config.update(log_with="wandb", log_images=False, wandb_project="rl4med-ddpo")
    config.process_timeout = 24 * 3600.0  # seconds that a process waits for others, which may work alone for hours
    config.progress = True  # progress bars, on a terminal only

    ###### Pretrained model ######
    config.pretrained = pretrained = ConfigDict()
    # Stable Diffusion in diffusers format: a folder, or a Hugging Face id (by default the mirror of runwayml's).
    pretrained.update(model="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="main")
    config.unet_path = ""  # UNet of stage (i) (safetensors, diffusers' names) to use instead of its own. Empty: none
    # LoRA or UNet weights to evaluate (eval.py, generate.py) or to start from (train.py; train.lora_rank and
    # train.lora_targets must match): a run folder, a checkpoint folder or a weight file. Empty: the base model.
    config.load_from = ""

    ###### Sampling ######
    config.sample = sample = ConfigDict()
    sample.num_steps = 50  # denoising steps
    sample.scheduler = "ddim"  # in eval.py also "dpm++": DPM-Solver++ (2M), deterministic, good with 15 to 25 steps
    sample.eta = 1.0  # DDIM's share of DDPM noise, in [0, 1]. Training needs eta > 0: without noise there is no policy
    sample.guidance_scale = 5.0  # classifier-free guidance weight; 1.0 or less switches guidance off
    # images per process and batch. In half precision on a GPU it is train.batch_size * train.timesteps_per_forward
    # instead, so that rollout and update use the same kernels; see also train.gradients_while_sampling.
    sample.batch_size = 1
    sample.num_batches_per_epoch = 2  # per process; batch_size * num_batches_per_epoch * processes = samples per epoch
    # consecutive samples that share a prompt (algorithm 1: M images per prompt). 1: a new prompt for each sample, as
    # in the official code. Must divide batch_size * num_batches_per_epoch.
    sample.images_per_prompt = 1

    ###### Training ######
    config.train = train = ConfigDict()
    train.batch_size = 1  # samples per process and pass; must divide sample.batch_size * num_batches_per_epoch
    train.use_8bit_adam = False  # bitsandbytes' 8-bit Adam (needs that package and a GPU)
    train.update(learning_rate=3e-4, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=1e-4, adam_epsilon=1e-8)
    # train batches per optimizer update. One update averages over batch_size * gradient_accumulation_steps * processes
    # samples and all of their trained timesteps.
    train.gradient_accumulation_steps = 1
    # timesteps of each sample in one forward and backward pass of batch_size * timesteps_per_forward rows (twice as
    # many with guidance). Same gradients up to rounding; more memory, but faster if small batches leave the device
    # idle. Must divide the number of trained timesteps.
    train.timesteps_per_forward = 1
    # updates with a non-finite loss or gradient are skipped; this number of them in a row aborts the run.
    train.max_skipped_updates = 10
    train.max_grad_norm = 1.0  # gradient norm above which gradients are scaled down
    train.num_inner_epochs = 1  # passes over one epoch's samples
    # guided noise prediction in the update. Must be on if sample.guidance_scale > 1: otherwise samples would be scored
    # by another policy than the one that sampled them, and ratios would be meaningless.
    train.cfg = True
    train.adv_clip_max = 5.0  # advantages are clipped to [-adv_clip_max, adv_clip_max]
    # PPO clip range of the ratio. Log-probs are *means* over latent dimensions D, so 1e-4 at D = 16,384 (512 px) clips
    # at +-1.64 nats of the true log-ratio; the equivalent at D = 1,024 is 1.6e-3.
    train.clip_range = 1e-4
    # share of a trajectory's timesteps to train on, chosen at random for each sample from the part timestep_window of
    # the trajectory: 0 = noise, 1 = image.
    train.update(timestep_fraction=1.0, timestep_window=(0.0, 1.0))
    # recompute activations in the backward pass: less memory, about a third more time.
    train.gradient_checkpointing = False
    # compute the gradient of an epoch's first update, where the ratio is 1, while sampling: this saves its forward
    # passes and gives the same gradient up to rounding. Its samples are drawn batch_size * timesteps_per_forward at a
    # time; each takes 4 bytes of CPU memory per adapter weight. Only for LoRA of linear layers and
    # timestep_fraction 1, without kl_coef and compile.
    train.gradients_while_sampling = True
    # torch.compile the UNet's transformer blocks: takes minutes at the start (cached between runs), then runs faster.
    # In half precision on a GPU, the rollout then runs with gradients enabled and takes as much memory as the update.
    train.compile = False
    # LoRA rank (the scale alpha / rank is 1, as in the published checkpoint), and suffixes of the names of UNet modules
    # that get an adapter.
    train.update(lora_rank=4, lora_targets=("to_q", "to_k", "to_v", "to_out.0"))
    train.kl_coef = 0.0  # weight in the loss of the KL divergence to the base model (adapters off). Needs use_lora
    # "per_prompt": running per-prompt statistics (below). "group": mean and standard deviation over this epoch's
    # samples of the same prompt (GRPO); needs sample.images_per_prompt > 1, since the only sample of a prompt has
    # advantage 0. "global": over all samples of the epoch.
    train.advantage = "per_prompt"

    ###### Stopping criterion of the paper ######
    # stop after this number of epochs in a row in which the mean reward changed by less than the tolerance. 0: never,
    # as in the official code.
    config.early_stop = ConfigDict({"patience": 0, "tolerance": 1e-3})

    ###### Held-out evaluation during training (train.py) ######
    config.held_out = held_out = ConfigDict()
    # epochs between evaluations of all prompts of prompt_fn from fixed noise, the first before training; 0: none. Each
    # draws images_per_prompt images of every prompt (8 * 32 = 256). The best checkpoint by APR is kept in <run>/best.
    held_out.update(every=0, images_per_prompt=8)
    held_out.classifier = ""  # the H=4 judge; refused if it also gives the reward
    # stop after this number of evaluations in a row whose APR is below the best by more than the tolerance (of 256
    # images, an APR near 1/2 has a standard error of 0.03). 0: never.
    held_out.update(patience=0, tolerance=0.05)

    ###### Prompts ######
    config.prompt_fn = "isic_all"  # name in PROMPTS of ddpo_pytorch/prompts.py, or "my_module:my_prompts"
    # its keyword arguments, except those set to None; those of your own function need not be declared here. from_file
    # reads lines [low, high) of path, fundus_table the captions of a table; composed fills `templates`, by default
    # ("The {eye} eye fundus image shows {finding}.",), with the findings of a table or of a model's training captions.
    config.prompt_fn_kwargs = KeywordArguments()
    for name, kind in (("path", str), ("low", int), ("high", int)):
        config.prompt_fn_kwargs[name] = placeholder(kind)

    ###### Rewards ######
    # name in REWARDS of ddpo_pytorch/rewards.py, "my_module:my_reward", or a weighted sum such as
    # "isic_classifier_reward:1.0,jpeg_compressibility:0.1".
    config.reward_fn = "isic_classifier_reward"
    # keyword arguments by reward name. Those of your own reward need not be declared here.
    config.reward_fn_kwargs = KeywordArguments()
    # folder of train_rlhf.py with Selector and Policy.
    config.reward_fn_kwargs.fundus_alignment.judges = root + "/rlhf"
    # H=6 attribute classifier whose predictions give the reward.
    config.reward_fn_kwargs.isic_classifier_reward.classifier = root + "/published/artifact_classifier_train_H6.pth"

    ###### Per-prompt statistics ######
    # rewards remembered for each prompt, 2 or more, and rewards of a prompt before its own mean and standard deviation
    # replace those of the batch, 2 to buffer_size. None instead: as with train.advantage="global".
    config.per_prompt_stat_tracking = OptionalBlock({"buffer_size": 16, "min_count": 16})

    ###### Data set ######
    config.dataset = dataset = ConfigDict()
    # folder of <image>.jpg files (any suffix, with or without _downsampled), and split table.
    dataset.data_path = dataset.csv = ""
    dataset.kind = "isic"  # "isic" or "fundus": format of the tables (ddpo_pytorch/data/isic.py, fundus.py)
    # side in pixels of the square images, and how they are made square: "stretch" (changes the aspect ratio, as in the
    # paper), "crop" (to the centre), "pad" (with black bars) or "fov" (crop to a fundus photograph's circle, then pad).
    dataset.update(image_size=512, resize="stretch")
    dataset.limit = 0  # rows to use; 0: all
    dataset.skip_broken = False  # skip damaged images, with a warning, instead of stopping
    dataset.num_workers = 0  # image decoding workers per process; 0: decode in the process itself

    ###### Evaluation (eval.py) ######
    config.eval = evaluation = ConfigDict()
    # prompts, one image folder each: "('caption one','caption two')". (): all prompts of prompt_fn; and the number of
    # images of each.
    evaluation.update(prompts=(), num_samples_per_prompt=960)
    evaluation.lora_scale = 1.0  # of the adapters, to interpolate between the base model (0) and the trained one (1)
    evaluation.batch_size = 20  # images per pass on a GPU; on a CPU the number follows from the size of the model
    evaluation.image_format = "png"  # "png" (lossless), or "jpg": quality 95 without chroma subsampling (4:4:4)
    evaluation.classifier = ""  # H-head classifier that scores samples as drawn, for image_log.json. Empty: none

    ###### Metrics (metric.py) ######
    config.metric = metric = ConfigDict()
    # sample folders: real images, generated images, and optionally those of a base model to compare these with; titles
    # of the last two.
    metric.real_path = metric.fake_path = metric.compare_path = ""
    metric.update(fake_name="SD+RL", compare_name="SD")
    # instead of these three: any number of folders, "SD=DIR,SD+RL=DIR", compared with the first. Folders of the same
    # name are generation seeds of one model; intervals over seeds need three or more.
    metric.folders = ""
    # folder of training images (at any depth), to find nearest neighbours of the samples and of real_path's images.
    metric.train_path = ""
    # a judge that took no part in training: H=4, or with other labels for folders with metadata.csv ("" with
    # metric.judges); and more judges, "H6=FILE,NAME=FILE".
    metric.classifier = metric.more_judges = ""
    metric.judges = ""  # folder of train_rlhf.py with judges of fundus images, in place of metric.classifier
    # folders for metrics.json and tables, and for image features (cached by content; may be deleted).
    metric.update(output="", cache_dir=root + "/cache/metrics")
    metric.batch_size = 256  # images per process and forward pass
    metric.prompts = ()  # captions to evaluate; (): all
    # feature networks of FID, KID and the like: "inception", "judge" (pooled features of metric.classifier, or of the
    # Selector), "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "clip_vitl14", or any name of timm.
    metric.extractors = ("inception", "judge")
    # "exact", or "compat", as for the published FIDs: x * 256 wrapped to 8 bits, and sets with different prompt mixes.
    metric.fid = "exact"
    # weights of Inception (torch-fidelity's .pth) for FID, AlexNet (torchvision's .pth) for LPIPS, and the other
    # extractors (timm's: a file, or a folder of <timm's name>.safetensors). "auto": from the torch hub cache.
    # "download": from there, or else downloaded. "": none.
    metric.inception = metric.alexnet = metric.encoders = "auto"
    metric.groups = ()  # columns of metadata.csv, ("sex", "age"), by which to report alignment, KID and nearness
    metric.quality = ()  # statistics of table 1 (fundus): "legacy", as in Mittal et al.; "fov", in the field of view
    metric.pairs_path = ""  # folder of images named like the generated ones, for SSIM of these pairs
    # for the report: more results, "FILE,FILE" (membership.json of membership.py, .summary.json of rate.py), and run
    # folders of train.py, for curves, "NAME=DIR,NAME=DIR".
    metric.results = metric.logs = ""

    ###### Stage (i): the generator itself (train_sd.py) ######
    config.sd = sd = ConfigDict()
    # "finetune": the UNet of pretrained.model, as in the paper. From scratch: "vae", then "unet" (and text encoder).
    sd.stage = "finetune"
    # output folder: a model in diffusers format ("vae", "unet"), pretrained_unet.safetensors ("unet", "finetune"), log
    # and sample grids. Rerun the same command to resume.
    sd.output = ""
    # training images and their split table, as in dataset.
    sd.update(kind="isic", data_path="", csv="", image_size=512, resize="stretch", limit=0, skip_broken=False)
    # split table for the validation loss ("": none), rows to use (0: all), and steps between validations.
    sd.update(val_csv="", val_images=512, val_every=500)
    # latents to use instead of images: <logdir>/latents of extract_dataset_latents.py, or <output>/latents/train of an
    # earlier run; "": encoded into <output>.
    sd.latents = sd.val_latents = ""
    # "finetune": folder of generate.py with images to train on as well, weighted by their Policy scores, and the share
    # of real images among all, at least half.
    sd.update(pool="", real_share=0.5)
    # cache of decoded images (stage "vae"; 3 image_size^2 bytes each; "" decodes at every step). Decoding workers.
    sd.update(cache_dir=root + "/cache", num_workers=0)
    # optimizer steps; images per process and forward pass, and forward passes per step.
    sd.update(num_steps=10_000, batch_size=64, gradient_accumulation_steps=1)
    # peak learning rate, reached after warmup_steps; then "cosine" to zero, or "constant".
    sd.update(learning_rate=1e-5, warmup_steps=100, lr_schedule="cosine")
    sd.caption_dropout = 0.1  # share of captions replaced by the empty one, for the unconditional model of guidance
    sd.min_snr_gamma = 0.0  # weight timesteps by min(snr, gamma) / snr (Hang et al. 2023; 5 is usual). 0: equally
    sd.ema_decay = 0.999  # of the EMA of the weights, which is saved, validated and sampled from; 0: no EMA
    # LoRA adapters (True; "finetune" only, saved next to the merged UNet) or all weights of the UNet (False).
    sd.update(use_lora=False, lora_rank=16, lora_targets=("to_q", "to_k", "to_v", "to_out.0"))
    # to save memory: recompute activations in the backward pass; bitsandbytes' 8-bit Adam (needs it and a GPU).
    sd.gradient_checkpointing = sd.use_8bit_adam = False
    # steps between log lines, between sample grids (0: none), and between saved states to resume from (0: none).
    sd.update(log_every=50, grid_every=1000, save_every=1000)
    sd.vae_kl_weight = 1e-6  # weight of the VAE's KL term
    # side in pixels of random crops that the VAE trains on, best without vae_attention; 0: whole images.
    sd.vae_crop = 0
    # weight of the VAE's perceptual loss, and its network: a timm model, or a weight file named after one.
    sd.update(perceptual_coef=0.0, perceptual_net="")
    # above 0, only the decoder of sd.vae is trained, and also against a patch discriminator, whose gradient is scaled
    # to this share of the other losses' gradient (0.5 to 1 in latent diffusion).
    sd.adversarial_coef = 0.0
    sd.vae = ""  # stage "vae": folder of the autoencoder to start from; "": from scratch
    sd.text_encoder = "clip"  # or "bert", which from scratch is new, and in "finetune" is sd.bert in place of CLIP
    # BERT's folder or Hugging Face id, and its length in tokens.
    sd.update(bert="microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext", text_tokens=256)
    sd.train_text_encoder = False  # "finetune": train it too, at a tenth of the learning rate; from scratch: always
    # parts trained from scratch. VAE: channels (multiples of 8) per resolution, latent channels, and whether it has
    # attention at its lowest resolution; UNet: channels and attention per resolution; text encoder: width (a multiple
    # of 16) and layers.
    sd.update(vae_channels=(16, 32, 32), vae_latent_channels=4, vae_attention=True)
    sd.update(unet_channels=(32, 64, 64), unet_attention=(False, True, True), text_width=64, text_layers=2)

    ###### Selector and Policy from expert ratings (train_rlhf.py) ######
    config.rlhf = rlhf = ConfigDict()
    # table image_path,rating,modality,expert_level,prompt (and rater_id; quality and alignment, if rated separately),
    # and the folder of its images ("": that of the table). Paths are relative to that folder or the table's, as those
    # of rate.py. All images must be inside that folder or base_log_path.
    rlhf.ratings = rlhf.data_path = ""
    # table of other patients' images, for metrics and threshold; "": val_share of the patients of `ratings`.
    rlhf.update(val_ratings="", val_share=0.2)
    rlhf.pool = ""  # folder of generate.py with images for stage 2 to train on as well, rated by the Selector; "": none
    # folder for selector.safetensors, policy.safetensors, metrics.jsonl. Rerun the same command to resume.
    rlhf.output = root + "/rlhf"
    rlhf.stages = (1, 2)  # 1: on all rated images. 2: on those that the Selector of stage 1, in `output`, passes
    # the Policy's frozen text encoder (a model folder of train_sd.py, or BERT as a folder or Hugging Face id), and the
    # length of prompts in tokens; longer ones are truncated.
    rlhf.update(text_encoder="microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext", text_tokens=256)
    # side in pixels of the images, a multiple of the patch; how they are made square (dataset.resize).
    rlhf.update(image_size=512, patch_size=16, resize="fov")
    # both image encoders: width, heads, layers, dropout.
    rlhf.update(width=768, heads=12, selector_layers=6, policy_layers=12, dropout=0.1)
    # how patches become tokens: "linear", as in Mittal et al.; "conv", convolutions with batch norm, which learn from a
    # thousand rated images what a linear stem cannot (see docs/fundus.md).
    rlhf.stem = "linear"
    # a timm network in place of the transformer, e.g. tf_efficientnet_lite0 ("": none); patch_size, stem, heads and
    # layers then have no effect. Its initial weights: "imagenet", "none" or the path of a file.
    rlhf.update(backbone="", backbone_weights="imagenet")
    # model folder whose autoencoder reconstructs rated photographs before training ("": none): otherwise judges
    # mistake its blur for a fault and reject every generated image.
    rlhf.autoencoder = ""
    # how the signed, detached advantage A = R - p moves the score p. "symmetric_log": A+ log p + A- log(1 - p); "log":
    # A log p, the official code's REINFORCE with its missing sign restored; "delta": A p, as documented there.
    rlhf.objective = "symmetric_log"
    # lowest Selector score with which an image passes; None: the one that best separates ratings of 2 or more from 1 on
    # the validation images (Youden's J). Saved with the Selector.
    rlhf.threshold = placeholder(float)
    rlhf.replay_share = 0.25  # of rejected images among stage 2's samples, without which scores only drift upwards
    # passes over the rated images, in each stage, and images per process and update.
    rlhf.update(num_epochs=100, batch_size=32)
    # Adam, with a cosine from learning_rate (stage 2: second_learning_rate) to final_learning_rate, stepped per epoch,
    # and a linear warm-up of stage 1, in updates (0: none, as in the official code).
    rlhf.update(learning_rate=1e-4, second_learning_rate=1e-4, final_learning_rate=1e-6, weight_decay=1e-4)
    rlhf.warmup_steps = 0
    rlhf.flip = True  # mirror images at random, and the eye in their prompts (not with "o'clock" and the like)
    # share of the images rated 3 in alignment that the Policy sees with another finding's caption and a target of 0,
    # drawn in every epoch.
    rlhf.wrong_captions = 0.0

    ###### Improvement rounds (improve.py) ######
    config.improve = improve = ConfigDict()
    improve.rounds = 3  # rounds of sampling, judging and training
    # how rounds change the generator: "finetune" (on images the judges chose, and real ones), "ddpo" (train.py). Before
    # that, update_policy continues stage 2 of the Policy, with the settings and ratings of rlhf, on a new pool.
    improve.update(methods=("finetune",), update_policy=False)
    # folder for round_<n>/ (pool, model, metrics) and rounds.jsonl. Rerun the same command to resume.
    improve.output = root + "/improve"
    # folders of train_rlhf.py: the judges that select and reward images, and held-out ones, trained on other ratings.
    improve.update(judges=root + "/rlhf", held_out_judges="")
    # best of N: images_per_prompt times for each prompt, sample images until num_candidates pass the Selector, at most
    # max_attempts; the Policy ranks those that passed.
    improve.update(max_attempts=10, num_candidates=3, images_per_prompt=1)
    # fine-tuning: steps, images per process and step, share of real ones (at least half), peak learning rate, decay of
    # the weight average (as sd.ema_decay).
    improve.update(num_steps=1000, batch_size=32, real_share=0.5, learning_rate=1e-5, ema_decay=0.99)
    # tables of real images to mix in, and to compare with, and the folder of their images.
    improve.csv = improve.held_out_csv = improve.data_path = ""
    improve.held_out_images = 4  # images per prompt for the metrics of a round, always from the same noise
    improve.control_guidance = (3.0,)  # control: guidance scales at which the initial generator is measured; (): none
    # timm architecture in whose features KID is measured as well ("": none), and its weights: "imagenet" or a file.
    # The features of a judge are blind to whatever the judge is blind to.
    improve.update(guard="", guard_weights="imagenet")
    # a collapse, which stops the run: the held-out score falls by more than tolerance, KID or another distance to real
    # images is above the first by more than kid_tolerance standard errors, or diversity is halved.
    improve.update(tolerance=0.02, kid_tolerance=3.0)

    return config.lock()


def experiments(module: dict) -> dict[str, Callable[[], ConfigDict]]:
    """Return the experiments defined in the file `module` by name: its public functions without arguments."""
    own = {key: f for key, f in module.items() if inspect.isfunction(f) and f.__module__ == module["__name__"]}
    return {key: f for key, f in own.items() if key[0] != "_" and not inspect.signature(f).parameters}


def choose(module: dict, name: str, inherited: Mapping = {}, scale: Callable | None = None) -> ConfigDict:
    """Return experiment `name` of the file `module`, or the one of `inherited` (name -> function) changed by `scale`.

    Raises ValueError, with all their names, for any other.
    """
    own = experiments(module)
    if name in own:
        return own[name]()
    if name in inherited:
        return scale(inherited[name]())
    raise ValueError(f"experiment {name!r} is unknown; {module['__file__']} has {', '.join({**own, **inherited})}")
