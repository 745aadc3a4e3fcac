"""Every setting of the fundus system alone (train_rlhf.py, improve.py), with its default. `base.py` takes them in."""

import ml_collections


def add_fundus(config: ml_collections.ConfigDict) -> None:
    """Add the blocks `rlhf` and `improve`, and fields of `metric`, to the defaults."""
    root = config.get_ref("base_log_path")

    ###### Selector and Policy from expert ratings (train_rlhf.py) ######
    config.rlhf = rlhf = ml_collections.ConfigDict()
    # ratings: image_path,rating,modality,expert_level,prompt (and rater_id; quality and alignment, if rated apart), and
    # the folder that holds their images ("": that of the table). Paths start from there or from the table's folder, as
    # those of rate.py do; images in base_log_path are read, too, and no others.
    rlhf.ratings = ""
    rlhf.data_path = ""
    # a table of other patients' images for the metrics and the threshold; "": val_share of the patients of `ratings`.
    rlhf.val_ratings = ""
    rlhf.val_share = 0.2
    # folder for selector.safetensors, policy.safetensors, metrics.jsonl. The same command again goes on there.
    rlhf.output = root + "/rlhf"
    # (1,): all rated images. (2,): those that the Selector in `output` passes, from stage 1's weights there. Or both.
    rlhf.stages = (1, 2)
    # the Policy's text encoder, frozen: a model folder of train_sd.py, or BERT as a folder or Hugging Face id.
    rlhf.text_encoder = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
    rlhf.text_tokens = 256  # a prompt is cut to so many
    # side in pixels that images are scaled to; a multiple of the patch.
    rlhf.image_size = 512
    rlhf.patch_size = 16
    rlhf.width = 768  # of both image encoders
    rlhf.heads = 12
    rlhf.selector_layers = 6
    rlhf.policy_layers = 12
    rlhf.dropout = 0.1
    # how patches become tokens: "linear", as in the document; "conv", convolutions with batch norm, which learns from
    # a thousand rated images what the other does not (see docs/fundus.md).
    rlhf.stem = "linear"
    # model folder whose autoencoder rated photographs pass before they are learned from ("": none): else judges that
    # have seen no generated image take the softness of the autoencoder for a fault, and reject whatever is generated.
    rlhf.autoencoder = ""
    # how the signed, detached advantage A = R - score moves the score p. "symmetric_log": A+ log p + A- log(1 - p);
    # "log": A log p, REINFORCE as in the official code, with the sign that it lost; "delta": A p, its documentation.
    rlhf.objective = "symmetric_log"
    # stage 2 weighs samples by Selector score / Policy score, clipped to importance_range, of mean 1. Off: all by 1.
    rlhf.importance = False
    rlhf.importance_range = (0.2, 5.0)
    # Selector score from which an image passes; None: where ratings of 2 or more are told best from 1 on the validation
    # images (Youden's J). It is kept with the Selector.
    rlhf.threshold = ml_collections.config_dict.placeholder(float)
    # of stage 2's samples, the share that the Selector rejects: without any, scores could only drift upwards.
    rlhf.replay_share = 0.25
    rlhf.num_epochs = 100  # passes over the rated images, in each stage
    rlhf.batch_size = 32  # images per process and update
    # Adam; from learning_rate (stage 2: second_learning_rate) to final_learning_rate along a cosine, a step an epoch.
    rlhf.learning_rate = 1e-4
    rlhf.second_learning_rate = 1e-4
    rlhf.final_learning_rate = 1e-6
    rlhf.weight_decay = 1e-4
    # updates of stage 1 over which the learning rate rises to its value; 0: none, as officially.
    rlhf.warmup_steps = 0
    rlhf.flip = True  # mirror images at random, but for those whose prompt names an eye or a side

    ###### Improvement rounds (improve.py) ######
    config.improve = improve = ml_collections.ConfigDict()
    improve.rounds = 3
    # what a round changes the generator by: "finetune" (on what the judges chose, and real images), "ddpo" (train.py).
    improve.methods = ("finetune",)
    # folder for round_<n>/ (pool, model, metrics) and rounds.jsonl. The same command again goes on there.
    improve.output = root + "/improve"
    # the judges of train_rlhf.py: those that choose, and others, of other ratings, that only measure.
    improve.judges = root + "/rlhf"
    improve.held_out_judges = ""
    # best of N: for each prompt images are drawn until num_candidates pass the Selector, max_attempts at most; the
    # Policy ranks them. So many times for each prompt.
    improve.max_attempts = 10
    improve.num_candidates = 3
    improve.images_per_prompt = 1
    # fine-tuning: steps, images per process and step, share of real ones (at least half), peak learning rate.
    improve.num_steps = 1000
    improve.batch_size = 32
    improve.real_share = 0.5
    improve.learning_rate = 1e-5
    improve.ema_decay = 0.99  # of the weight average that is kept; see sd.ema_decay
    # only real images that the Selector passes are mixed in: of an archive of mixed quality the rest teaches what the
    # rounds are to unlearn.
    improve.select_real = False
    # real images to mix in, and others to compare with: fundus tables, and the folder of their images.
    improve.csv = ""
    improve.held_out_csv = ""
    improve.data_path = ""
    # images per prompt for the measures of a round, always from the same noise.
    improve.held_out_images = 4
    # a round that lowers the held-out judges' score by more than this, or raises KID by more than so many times its
    # standard error over that of the first, or halves the diversity, has collapsed: the run stops and says so.
    improve.tolerance = 0.02
    improve.kid_tolerance = 3.0

    ###### Metrics of fundus images (metric.py) ######
    # folder of train_rlhf.py whose Selector and Policy judge in place of metric.classifier, which is then "".
    config.metric.judges = ""
    # sets of image statistics for table 1: "legacy", as in the document's table; "fov", inside the field of view.
    config.metric.quality = ()
    # a folder whose images have the names of the generated ones: SSIM is taken of these pairs and of no others.
    config.metric.pairs_path = ""
