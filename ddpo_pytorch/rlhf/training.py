"""Two stages of learning from ratings: both judges on all rated images, then the Policy on those the Selector passes.

Order, flips and dropout of an epoch are functions of (seed, stage, epoch, process), so a resumed training ends with the
same weights as an uninterrupted one. The last epoch's weights are kept: the learning rate has decayed by then, and
selecting an epoch on the held-out images would bias the metrics measured on them.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from ml_collections import ConfigDict

from ddpo_pytorch.data.fundus import MODALITY, modality_of
from ddpo_pytorch.data.images import RESIZES
from ddpo_pytorch.judges import policy as policies
from ddpo_pytorch.judges import selector as selectors
from ddpo_pytorch.judges.classifier import new_classifier
from ddpo_pytorch.judges.classifier_training import EpochBatches, reset_scaler
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, Policy, TextFeatures, save_policy
from ddpo_pytorch.judges.selector import MLP_RATIO, Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes, read_judge
from ddpo_pytorch.metrics.tables import to_markdown
from ddpo_pytorch.rlhf.rated_images import RatedSet, best_threshold, by_finding, measures, probe
from ddpo_pytorch.rlhf.reinforce import OBJECTIVES, advantages, reinforce_loss
from ddpo_pytorch.utils import settings as allowed
from ddpo_pytorch.utils.distributed import to_device
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import JsonLines, write_file
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import COUNT
from ddpo_pytorch.utils.randomness import Stream, derived_seed, generator_of
from ddpo_pytorch.utils.settings import check_choices, check_ranges
from ddpo_pytorch.utils.training_state import TrainState

logger = logging.getLogger(__name__)
FIRST_POLICY = "policy_stage_1.safetensors"  # initial weights of stage 2
DESCRIPTION = policies.DESCRIPTION | {"origin": {"stage": range(1, 3), "epochs": COUNT}}
SIZES = ("image_size", "patch_size", "width", "heads", "dropout", "stem", "backbone")  # settings of both judges
COLUMN = {"selector": "quality", "policy": "alignment"}
# settings that do not identify a stage: paths (their contents do) and, for stage 1, settings of stage 2
PATHS = ("ratings", "data_path", "val_ratings", "pool", "output", "stages", "text_encoder", "autoencoder")
PATHS += ("backbone_weights",)
SECOND_ONLY = ("second_learning_rate", "replay_share")
RANGES = dict.fromkeys(("num_epochs", "batch_size"), allowed.ONE_OR_MORE)
RANGES |= {"text_tokens": allowed.Range("[2, 65535]", whole=True)}  # as in the Policy's file
RANGES |= dict.fromkeys(("learning_rate", "second_learning_rate", "final_learning_rate"), allowed.POSITIVE)
RANGES |= dict.fromkeys(("replay_share", "val_share", "wrong_captions"), allowed.BELOW_ONE)
RANGES |= {"warmup_steps": allowed.ZERO_OR_MORE, "weight_decay": allowed.NOT_NEGATIVE}


def check_settings(rlhf: ConfigDict) -> None:
    """Raise UserError for settings out of range, and for impossible sizes of the judges."""
    if tuple(rlhf.stages) not in ((1,), (2,), (1, 2)):
        raise UserError(f"rlhf.stages is {tuple(rlhf.stages)}; allowed are (1,), (2,) and (1, 2)")
    check_choices(rlhf, {"objective": OBJECTIVES, "resize": RESIZES}, "rlhf.")
    check_ranges(rlhf, RANGES if rlhf.threshold is None else RANGES | {"threshold": allowed.SHARE}, "rlhf.")
    judge_sizes(rlhf)


def judge_sizes(rlhf: ConfigDict) -> tuple[VisionSizes, VisionSizes]:
    """Return the sizes of Selector and Policy. Raises UserError for impossible ones."""
    sizes = {name: rlhf[name] for name in SIZES}
    selector = VisionSizes(layers=rlhf.selector_layers, mlp_ratio=MLP_RATIO, **sizes)
    return selector, VisionSizes(layers=rlhf.policy_layers, **sizes)


def chosen_samples(passed: torch.Tensor, replay_share: float, seed: int) -> torch.Tensor:
    """Return the ascending indices of stage 2's samples: all that passed (bool (N,)), and some that did not.

    The latter are drawn with `seed` to make up `replay_share` of the samples, or all of them if there are too few.
    Raises UserError if no image passed.
    """
    if not passed.any():
        advice = "lower rlhf.threshold, or train stage 1 for longer or on more ratings elsewhere"
        problem = f"the Selector passes none of {len(passed)} rated images, so stage 2 has no samples"
        raise UserError(f"{problem}; stage 1's files are unchanged: {advice}")
    accepted, rejected = passed.nonzero().flatten(), (~passed).nonzero().flatten()
    wanted = min(len(rejected), round(replay_share / (1 - replay_share) * len(accepted)))
    replayed = torch.randperm(len(rejected), generator=generator_of(seed, Stream.ORDER, 2))[:wanted]
    return torch.cat([accepted, rejected[replayed]]).sort().values


def all_scores(accelerator: Accelerator, judge: Selector | Policy, rated: RatedSet, batch_size: int) -> torch.Tensor:
    """Return scores (N, 1 + criteria) in order, float32 on the CPU of every process; processes take batches in turn.

    The first column is the judge's score; a Selector's other columns are its criteria.
    """
    table = torch.zeros(len(rated), 1 + len(judge.criteria), device=accelerator.device)
    for indices in torch.arange(len(rated)).split(batch_size)[accelerator.process_index :: accelerator.num_processes]:
        images = (rated.images[indices].float() / 255).to(accelerator.device)
        prompts = [rated.prompts[index] for index in indices.tolist()]
        table[indices] = judge.score(images, prompts)[:, None] if isinstance(judge, Policy) else judge.score_all(images)
    return accelerator.reduce(table, "sum").cpu()  # each row comes from one process and is zero in the others


def state_path(output: Path, stage: int) -> Path:
    """Return the path of a stage's training state, which is removed once the last stage's judges are saved."""
    return output / f"stage_{stage}.unfinished.pt"


def train_stage(
    accelerator: Accelerator, config: ConfigDict, judges: Mapping[str, Any], train: RatedSet, val: RatedSet
) -> dict[str, Any]:
    """Run or resume stage 1 or 2 and return its description. The judges end in eval mode; the training state remains.

    `judges`: "selector" and "policy" in stage 1, "policy" in stage 2. `train` and `val`: images to learn from, and
    images of other patients to measure with. Writes metrics.jsonl and findings.md. Raises UserError for a non-finite
    loss, and for fewer images than processes.
    """
    rlhf, output, device = config.rlhf, Path(config.rlhf.output), accelerator.device
    stage = 1 if "selector" in judges else 2
    first_epoch = judges["policy"].origin.get("epochs", 0)  # those of earlier stages keep their lines in metrics.jsonl
    rank, processes = accelerator.process_index, accelerator.num_processes
    if len(train) < processes:
        raise UserError(f"{len(train)} rated images are too few for {processes} processes; add images")
    ignored = PATHS if stage == 2 else PATHS + SECOND_ONLY
    settings = {f"rlhf.{name}": value for name, value in rlhf.to_dict().items() if name not in ignored} | {
        "stage": stage,
        "seed": config.seed,
        "mixed_precision": accelerator.mixed_precision,
        "processes": processes,
        "text encoder": judges["policy"].text.fingerprint,
        "weights at the start": {name: fingerprint(judge) for name, judge in judges.items()},
        "training ratings": train.digest,
        "validation ratings": val.digest,
    }
    seed = derived_seed(config.seed, Stream.ORDER, stage)
    parameters = [parameter for judge in judges.values() for parameter in judge.parameters()]
    fused = device.type == "cuda" or None  # with fp16, other implementations wait for the GPU at each step
    optimizer = torch.optim.Adam(parameters, weight_decay=rlhf.weight_decay, fused=fused)
    reset_scaler(accelerator)
    *prepared, optimizer = accelerator.prepare(*judges.values(), optimizer)
    models = dict(zip(judges, prepared, strict=True))
    batches = EpochBatches(len(train), len(train), rlhf.batch_size, seed, rank, processes)
    parts = {"optimizer": optimizer, "scaler": accelerator.scaler, **judges}
    state = TrainState(state_path(output, stage), settings, **parts)

    def loss_of(name: str, indices: torch.Tensor, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the loss of one judge, summed over outputs, for float images (B, 3, S, S) with these indices (B,)."""
        judge = judges[name]
        inputs = (judge.text(prompts).to(device),) if name == "policy" else ()
        with accelerator.autocast():
            logits = models[name](judge.preprocess(images), *inputs)
        logits = logits.float().view(len(images), -1)  # (B, 1 + criteria)
        values, weights = logits.sigmoid(), to_device(train.weights[indices], device)
        if stage == 2:  # the baseline is the score without dropout
            values = judge.score(images, prompts)[:, None]
        summed = []
        for output, column in enumerate((COLUMN[name], *judge.criteria)):
            rewards = to_device(targets[column][indices], device)  # of this epoch
            gains = advantages(rewards.nan_to_num(), values[:, output])
            summed.append(reinforce_loss(logits[:, output], gains, weights * ~rewards.isnan(), rlhf.objective))
        return torch.stack(summed).sum()

    def held_out() -> dict[str, dict[str, float | None]]:
        """Return `measures` of each judge on the held-out images; the Selector's use its currently best threshold."""
        metrics = {}
        for name, judge in judges.items():
            for buffer in judge.buffers():  # batch-norm statistics differ between processes
                broadcast(buffer)
            scores, *others = all_scores(accelerator, judge, val, rlhf.batch_size).unbind(1)
            rewards = val.rewards[COLUMN[name]]
            threshold = rlhf.threshold if name == "selector" else None
            if name == "selector" and threshold is None:
                threshold, _ = best_threshold(scores, rewards)
            metrics[name] = measures(scores, rewards, threshold)
            for criterion, scores in zip(judge.criteria, others, strict=True):
                rewards = val.rewards.get(criterion, torch.full((len(val),), torch.nan))
                if (rated := ~rewards.isnan()).any():
                    metrics[name][f"spearman_{criterion}"] = measures(scores[rated], rewards[rated])["spearman"]
        return metrics

    done = (state.load() or {"epoch": 0})["epoch"]
    if done:
        logger.info("resuming from %s: %d epochs are done", state.path, done)
    if done < rlhf.num_epochs:  # else the next stage may already have written to it
        log = JsonLines(output / "metrics.jsonl", accelerator.is_main_process, keep=first_epoch + done)
    for epoch in range(done, rlhf.num_epochs):
        batches.epoch, started = epoch, time.perf_counter()
        recorded = []  # losses (judges,) of each batch
        flips = train.flips(seed, epoch) if rlhf.flip else torch.zeros(len(train)).bool()
        sources = train.caption_sources(rlhf.wrong_captions, seed, epoch)
        own = sources == torch.arange(len(train))
        targets = train.rewards | {"alignment": train.rewards["alignment"].where(own, 0.0)}
        for model in models.values():
            model.train()
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            # 1 + rank, since `flips` uses the same seed without it
            torch.manual_seed(derived_seed(seed, Stream.NOISE, epoch, 1 + rank))
            for update, batch in enumerate(batches, epoch * len(batches)):
                for group in optimizer.param_groups:
                    group["lr"] = rate = learning_rate(rlhf, stage, update, len(batches))
                indices = torch.tensor(batch)
                images, flipped = train.images[indices], flips[indices]
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
                images = to_device(images, device).float() / 255
                captions = [train.mirrored if mirror else train.prompts for mirror in flipped.tolist()]
                prompts = [given[source] for given, source in zip(captions, sources[indices].tolist(), strict=True)]
                batch_losses = torch.stack([loss_of(name, indices, images, prompts) for name in judges])
                accelerator.backward(batch_losses.sum())  # the judges share no weights
                optimizer.step()
                optimizer.zero_grad()
                recorded.append(batch_losses.detach())
        means = accelerator.reduce(torch.stack([row.mean() for row in torch.stack(recorded, dim=1)]), "mean")
        losses = dict(zip(judges, means.tolist(), strict=True))
        speed = len(train) / (time.perf_counter() - started)
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise UserError(f"the {name}'s loss is {loss} in epoch {epoch}, stage {stage}; lower the learning rate")
        metrics = held_out()
        entry = {"epoch": first_epoch + epoch, "stage": stage, "learning_rate": rate, "loss": losses, **metrics}
        log.write(entry | {"images_per_second": round(speed, 1)})
        for name, measured in metrics.items():
            values = (f"{key} {'-' if value is None else format(value, '.3f')}" for key, value in measured.items())
            logger.info("stage %d epoch %d  %s: loss %.4f, %s", stage, epoch, name, losses[name], ", ".join(values))
        if accelerator.is_main_process:
            state.save(epoch=epoch + 1)
    # a generated image counts as a patient of its own, named like images in other folders
    patients = {image.patient for image in (*train.rated, *val.rated) if image.patient != image.image}
    description = {"stage": stage, "epochs": first_epoch + rlhf.num_epochs, "settings": settings}
    description |= {"patients": sorted(fingerprint(patient)[:12] for patient in patients), "held_out": held_out()}
    for model in prepared:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    scores = all_scores(accelerator, judges["policy"], val, rlhf.batch_size)[:, 0]
    if accelerator.is_main_process:
        report("AUC of right against wrong captions", by_finding(scores, val), output / "findings.md")
    return description


def learning_rate(rlhf: ConfigDict, stage: int, update: int, updates_per_epoch: int) -> float:
    """Return the learning rate of an update, counted from 0: cosine over epochs, with linear warm-up in stage 1."""
    first = rlhf.learning_rate if stage == 1 else rlhf.second_learning_rate
    last, epoch = min(first, rlhf.final_learning_rate), update // updates_per_epoch
    warm_up = min(1.0, (update + 1) / rlhf.warmup_steps) if stage == 1 and rlhf.warmup_steps else 1.0
    return warm_up * (first - (first - last) * (1 - math.cos(math.pi * epoch / rlhf.num_epochs)) / 2)


###### The two stages ######


def check_output(rlhf: ConfigDict) -> None:
    """Raise UserError for an output folder in which the stages can neither start nor resume.

    Stage 2 needs a Selector and a Policy, usually stage 1's, in the files of those names, and of the configured sizes.
    """
    output, stages = Path(rlhf.output), tuple(rlhf.stages)
    selector, policy, unfinished = output / SELECTOR_FILE, output / POLICY_FILE, state_path(output, stages[0]).exists()
    if stages[0] == 1:
        if (selector.exists() or policy.exists()) and not unfinished:
            advice = "choose another rlhf.output or move them away, or continue from stage 1 with rlhf.stages=(2,)"
            raise UserError(f"{str(output)!r} holds judges that are finished; {advice}")
        return
    if not (selector.exists() and first_policy(output).exists()):
        raise UserError(f"{str(output)!r} holds no judges of stage 1; run rlhf.stages=(1,2) or (1,)")
    if policy.exists() and not unfinished and read_judge(policy, "policy", DESCRIPTION)[0]["origin"]["stage"] == 2:
        raise UserError(f"stage 2 in {str(output)!r} is finished; choose another rlhf.output, or move it away")
    check_sizes(rlhf, selector, first_policy(output))


def first_policy(output: Path) -> Path:
    """Return the file of stage 1's Policy."""
    return output / (FIRST_POLICY if (output / FIRST_POLICY).exists() else POLICY_FILE)


def check_sizes(rlhf: ConfigDict, selector: Path, policy: Path) -> None:
    """Raise UserError, naming the first, for settings of sizes that differ from those of the judges in these files."""
    one, _ = read_judge(selector, "selector", selectors.DESCRIPTION)
    other, _ = read_judge(policy, "policy", DESCRIPTION)
    found = {"selector_layers": one["sizes"].layers, "policy_layers": other["sizes"].layers}
    found["text_tokens"] = other["text"]["tokens"]
    for sizes in (one["sizes"], other["sizes"]):
        found |= {name: getattr(sizes, name) for name in SIZES}
        if changed := difference(found, {name: rlhf[name] for name in found}):
            raise UserError(f"{str(policy.parent)!r} holds judges with rlhf.{changed}; give the same value")


def first_stage(accelerator: Accelerator, config: ConfigDict, train_set: RatedSet, val_set: RatedSet) -> None:
    """Train both judges on all ratings and calibrate the threshold."""
    rlhf, output = config.rlhf, Path(config.rlhf.output)
    selector_sizes, policy_sizes = judge_sizes(rlhf)
    with accelerator.local_main_process_first():  # one process downloads
        text = TextFeatures(rlhf.text_encoder, rlhf.text_tokens, accelerator.device)
        if rlhf.backbone:
            start = new_classifier(("none",), rlhf.image_size, rlhf.backbone, rlhf.backbone_weights).model.state_dict()
    set_seed(config.seed)
    selector, policy = Selector(selector_sizes, train_set.criteria), Policy(policy_sizes, text)
    policy.fit_text(train_set.prompts)
    for judge in (selector, policy) if rlhf.backbone else ():
        encoder = judge.encoder.vit
        encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})  # all but the classifier
    judges = {"selector": selector, "policy": policy}
    selector.origin = policy.origin = train_stage(accelerator, config, judges, train_set, val_set)
    calibrate(selector, all_scores(accelerator, selector, val_set, rlhf.batch_size)[:, 0], val_set, rlhf.threshold)
    if accelerator.is_main_process:
        if modality_of(val_set.prompts[0]) == MODALITY:
            probes = probe(selector, val_set, rlhf.batch_size)
            report("Selector scores of validation images, as they are and damaged", probes, output / "probes.md")
        save_selector(selector, output / SELECTOR_FILE)
        save_policy(policy, output / POLICY_FILE)
        (output / FIRST_POLICY).unlink(missing_ok=True)  # of an earlier training, whose judges were moved away
    accelerator.wait_for_everyone()


def report(title: str, table: pd.DataFrame, path: Path) -> None:
    """Log a table and write it as Markdown."""
    text = to_markdown(table)
    logger.info("%s:\n%s", title, text)
    write_file(path, text)


def calibrate(selector: Selector, scores: torch.Tensor, rated: RatedSet, given: float | None) -> None:
    """Set the Selector's threshold: the given one, else the best one for these images' scores."""
    if given is not None:
        selector.threshold, selector.calibration = given, {"how": "given as rlhf.threshold"}
    else:
        selector.threshold, youden = best_threshold(scores, rated.rewards["quality"])
        selector.calibration = {"how": "best J for ratings of 2 or more", "J": youden, "images": len(rated)}
        if youden <= 0:
            logger.warning("the Selector is no better than chance; its threshold is meaningless")
    share = selector.accepts(scores).double().mean().item()
    logger.info("threshold %.4f (%s) passes %.1f %%", selector.threshold, selector.calibration["how"], 100 * share)


def second_stage(accelerator: Accelerator, config: ConfigDict, train_set: RatedSet, val_set: RatedSet) -> None:
    """Train stage 1's Policy on images that the Selector passes, and on a share of rejected ones."""
    rlhf, output = config.rlhf, Path(config.rlhf.output)
    first = first_policy(output)
    selector = load_selector(output / SELECTOR_FILE, accelerator.device)
    policy = policies.load_policy_judge(first, accelerator.device, rlhf.text_encoder).requires_grad_(True)
    if policy.origin.get("settings", {}).get("validation ratings") != val_set.digest:
        # another seed or table: the new validation images may have been among the training images
        logger.warning("stage 1 was measured on other images; metrics may include images that it has learned from")
    scores = all_scores(accelerator, selector, train_set, rlhf.batch_size)[:, 0]
    other_threshold = rlhf.threshold is not None and rlhf.threshold != selector.threshold
    if other_threshold:
        calibrate(selector, scores, train_set, rlhf.threshold)
    passed = selector.accepts(scores)
    chosen = chosen_samples(passed, rlhf.replay_share, config.seed)
    counts = int(passed.sum()), len(passed), len(chosen) - int(passed.sum())
    logger.info("stage 2: %d of %d images that the Selector passes, and %d that it rejects", *counts)
    if accelerator.is_main_process and first.name != FIRST_POLICY:
        write_file(output / FIRST_POLICY, first.read_bytes())
    policy.origin = train_stage(accelerator, config, {"policy": policy}, train_set.subset(chosen), val_set)
    if accelerator.is_main_process:
        if other_threshold:
            save_selector(selector, output / SELECTOR_FILE)
        save_policy(policy, output / POLICY_FILE)
    accelerator.wait_for_everyone()
