"""Every setting of stage (i) alone (train_sd.py), with its default. `base.py` takes them in."""

import ml_collections


def add_sd(config: ml_collections.ConfigDict) -> None:
    """Add the block `sd` to the defaults."""
    ###### Stage (i): the generator itself (train_sd.py) ######
    config.sd = sd = ml_collections.ConfigDict()
    # "finetune": the UNet of pretrained.model, as in the paper. From nothing: "vae", then "unet" (with text encoder).
    sd.stage = "finetune"
    # folder for the outcome: a model in diffusers format ("vae", "unet"), pretrained_unet.safetensors ("unet",
    # "finetune"), log and sample grids. The same command again goes on with what is unfinished there.
    sd.output = ""
    # training images and their split table, of which kind (see dataset.kind); side in pixels and way in which they are
    # made square (dataset.resize); rows used (0 = all); whether damaged images are left out instead of stopping.
    sd.kind = "isic"
    sd.data_path = ""
    sd.csv = ""
    sd.image_size = 512
    sd.resize = "stretch"
    sd.limit = 0
    sd.skip_broken = False
    # split table for the validation loss, its rows used (0 = all), and steps between validations. "": none.
    sd.val_csv = ""
    sd.val_images = 512
    sd.val_every = 500
    # latents of extract_dataset_latents.py (<logdir>/latents) in place of images and tables. "": made in <output>.
    sd.latents = ""
    sd.val_latents = ""
    # "finetune": folder of generate.py whose images are learned from as well, weighted by the Policy's scores, and the
    # share that real images keep among them, at least half.
    sd.pool = ""
    sd.real_share = 0.5
    # folder for decoded images (stage "vae"; 3 image_size^2 bytes each); "" decodes at every step. Decoding processes.
    sd.cache_dir = config.get_ref("base_log_path") + "/cache"
    sd.num_workers = 0
    # optimizer steps; images per process and forward pass, and forward passes per step.
    sd.num_steps = 10_000
    sd.batch_size = 64
    sd.gradient_accumulation_steps = 1
    # peak learning rate, reached in warmup_steps; then "cosine" to zero, or "constant".
    sd.learning_rate = 1e-5
    sd.warmup_steps = 100
    sd.lr_schedule = "cosine"
    # share of captions replaced by the empty one: the unconditional model that guidance needs.
    sd.caption_dropout = 0.1
    # weight timesteps by min(snr, gamma) / snr (Hang et al. 2023; 5 is usual). 0: all alike.
    sd.min_snr_gamma = 0.0
    # decay of the weight average that is saved, validated and drawn from; 0 takes the last weights.
    sd.ema_decay = 0.999
    # LoRA adapters (True; "finetune" only, saved beside the merged UNet) or all weights of the UNet (False).
    sd.use_lora = False
    sd.lora_rank = 16
    sd.lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    # less memory: recompute activations in the backward pass; bitsandbytes' 8-bit Adam (needs that package and a GPU).
    sd.gradient_checkpointing = False
    sd.use_8bit_adam = False
    # steps between log lines, between sample grids (0: none), and between states to resume from (0: none).
    sd.log_every = 50
    sd.grid_every = 1000
    sd.save_every = 1000
    sd.vae_kl_weight = 1e-6  # of the VAE's KL term
    sd.vae = ""  # stage "vae": folder of the autoencoder to begin with; "" begins from nothing
    # "clip", or "bert": from nothing a BERT of its own, in "finetune" sd.bert (folder or Hugging Face id) in CLIP's
    # place, saved with the model. A prompt has text_tokens tokens for it, of which padding is masked.
    sd.text_encoder = "clip"
    sd.bert = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
    sd.text_tokens = 256
    sd.train_text_encoder = False  # in "finetune", too, with a tenth of the learning rate; from nothing it always is
    # parts trained from nothing: channels by resolution, which have attention; width and layers of the text encoder.
    sd.vae_channels = (16, 32, 32)
    sd.unet_channels = (32, 64, 64)
    sd.unet_attention = (False, True, True)
    sd.text_width = 64
    sd.text_layers = 2
