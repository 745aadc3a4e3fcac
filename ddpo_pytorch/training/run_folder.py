"""The folder of a training run: who may write there, whether a command goes on in it, and from which checkpoint."""

import json
import logging
import netrc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ddpo_pytorch.rewards import parse_spec
from ddpo_pytorch.training.checkpoints import (
    best_names,
    checkpoints,
    epochs_completed,
    fault,
    find_checkpoint,
    is_checkpoint,
    put_aside,
    recover_best,
)
from ddpo_pytorch.utils.distributed import run_on_main_process
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import LOCK, atomic_write, locked
from ddpo_pytorch.utils.fingerprint import with_contents
from ddpo_pytorch.utils.json_files import read_json

CONFIG = "config.json"
# Settings that may change when a run goes on: they do not change what an epoch does.
FREE = frozenset(
    (
        # where things are; of load_from the content is compared
        *("base_log_path", "logdir", "run_name", "resume_from", "load_from"),
        *("num_epochs", "early_stop", "held_out.patience", "held_out.tolerance"),  # when it ends
        *("save_freq", "num_checkpoint_limit", "wandb", "wandb_project", "progress"),  # what is seen of it
        "process_timeout",
        *("dataset", "eval", "metric", "sd", "rlhf", "improve"),  # blocks of other scripts
        "contents",  # compared on its own
    )
)

ARGUMENTS = ("prompt_fn_kwargs.", "reward_fn_kwargs.")
# Under this name config.json keeps fingerprints of the files behind the settings, and these are their settings.
CONTENTS = "contents"
BEHIND = {
    "model": ("pretrained", "unet_path", "mixed_precision", "use_lora"),
    "reward": ("reward_fn", "reward_fn_kwargs"),
    "prompts": ("prompt_fn", "prompt_fn_kwargs"),
}

logger = logging.getLogger(__name__)


def open_run(
    accelerator: Accelerator, held: ExitStack, logdir: str, run_name: str, resume_from: str, settings: Mapping[str, Any]
) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to continue from, agreed between processes.

    The folder is `<logdir>/<run_name>` (date and time without a name). One that exists is gone on with where it was, if
    it was begun with the same `settings` (JSON-able; those of `FREE` are not compared), or anew if there was no
    checkpoint yet. `resume_from` goes on in the folder of its checkpoint, with any settings, and must start from the
    newest whole one there, so nothing is overwritten; a `run_name` beside it, which experiments of config/dgx.py have,
    is not used. Damaged checkpoints newer than the one found are put aside.

    The main process locks the folder until `held` is closed or it ends. Raises UserError (on the main process; the
    others exit) for a folder that another run is writing, for other settings, of which the first is named, and as
    `find_checkpoint` does.
    """
    return run_on_main_process(accelerator, _open_run, held, logdir, run_name, resume_from, settings)


def _open_run(
    held: ExitStack, logdir: str, run_name: str, resume_from: str, settings: Mapping[str, Any]
) -> tuple[Path, Path | None]:
    if resume_from:
        given = Path(resume_from)
        folder = given.parent if is_checkpoint(given) else given
        if not is_checkpoint(given) and not _holds_checkpoint(given):
            find_checkpoint(given)  # says what is missing
        held.enter_context(locked(folder, "another run"))
        recover_best(folder)
        checkpoint = find_checkpoint(given)
        try:
            old = _last_settings(folder)
        except UserError:  # a checkpoint may have been copied alone
            old = {}
        _check_contents(folder, old, settings, resume_from=True)
        if run_name and Path(run_name).name != folder.resolve().name:
            logger.info("run_name %r is not used: resume_from continues a run in its own folder", run_name)
    else:
        folder = Path(logdir) / (run_name or time.strftime("%Y.%m.%d_%H.%M.%S"))
        held.enter_context(locked(folder, "another --config.run_name"))
        checkpoint = _continued(folder, settings)
    if checkpoint is not None:
        _clear_way(checkpoint)
    return folder, checkpoint


def _continued(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint from which a command of these settings goes on in a folder; None for a new run."""
    if not any(path.name != LOCK for path in folder.iterdir()):
        return None
    old = _last_settings(folder)
    if changed := difference(*_comparable(old, settings)):
        name, before, now = changed
        raise UserError(
            f"run folder {str(folder)!r} exists already and was begun with {name}={before}, now it is {now}; give the "
            f"same to go on with it, another --config.run_name to begin a new run, or --config.resume_from={folder} to "
            "go on with the new settings"
        )
    _check_contents(folder, old, settings, resume_from=False)
    recover_best(folder)
    if _holds_checkpoint(folder):
        return find_checkpoint(folder)
    log = folder / "metrics.jsonl"
    if log.is_file() and log.read_bytes().count(b"\n") > old.get("save_freq", 1):
        raise UserError(
            f"run folder {str(folder)!r} has a log of epochs but their checkpoints are gone; choose another "
            "--config.run_name, or move it away"
        )
    logger.info("%s has no checkpoint yet: beginning anew", folder)
    return None


def _holds_checkpoint(folder: Path) -> bool:
    return bool(checkpoints(folder)) or any(path.is_dir() for path in best_names(folder))


def _clear_way(checkpoint: Path) -> None:
    """Put aside what is damaged and newer than a checkpoint. UserError for a newer one that is whole."""
    for newer in checkpoints(checkpoint.parent):
        if epochs_completed(newer) <= epochs_completed(checkpoint):
            continue
        if fault(newer) is None:
            raise UserError(
                f"{str(checkpoint)!r} is not the newest checkpoint of its run; continuing would overwrite "
                f"{newer.name}: resume from that, or copy the checkpoint into a folder of its own"
            )
        logger.info("%s was put aside as %s", newer, put_aside(newer).name)


def write_settings(folder: Path, settings: Mapping[str, Any], epoch: int, resumed: bool) -> None:
    """Record a run's settings: config.json, or config_<epochs so far>.json where a resumed run was given others."""
    text = json.dumps(settings, indent=1, default=str) + "\n"
    newest = ([None, *_settings_files(folder)])[-1]
    if resumed and newest is not None and newest.read_text() == text:
        return
    with atomic_write(folder / (f"config_{epoch:04d}.json" if resumed else CONFIG), durable=True) as temporary:
        temporary.write_text(text)


def _settings_files(folder: Path) -> list[Path]:
    """config.json first, then those of later starts."""
    return [path for path in (folder / CONFIG, *sorted(folder.glob("config_*.json"))) if path.is_file()]


def _last_settings(folder: Path) -> dict[str, Any]:
    files = _settings_files(folder)
    problem = f"its {files[-1].name} is damaged" if files else f"it holds no {CONFIG}"
    try:
        return read_json(files[-1], {"save_freq?": int})
    except (IndexError, UserError) as error:
        raise UserError(
            f"run folder {str(folder)!r} exists already, and {problem}; choose another --config.run_name, continue it "
            f"with --config.resume_from={folder} if it holds a checkpoint, or move it away"
        ) from error


def _comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what must be equal of two settings, by dotted names.

    A field that only one of them has belongs to another version of this program and is not compared, but for keyword
    arguments of prompt functions and rewards, which are there when they are given; nor is one that nothing reads.
    """
    plain = json.loads(json.dumps(new, default=str))
    left, right = dict(_flat(old)), dict(_flat(plain))
    recorded = bool(old.get(CONTENTS))
    both = [name for name in left | right if name.startswith(ARGUMENTS) or (name in left and name in right)]
    names = [name for name in both if name not in FREE and name.split(".")[0] not in FREE and _is_read(name, right)]
    names = [name for name in names if not (recorded and _is_by_content(name, right.get(name)))]
    return {name: left.get(name) for name in names}, {name: right.get(name) for name in names}


def _is_by_content(name: str, value: Any) -> bool:
    """Return whether a setting is the path of a file or folder of which config.json keeps a fingerprint."""
    if name in ("pretrained.model", "pretrained.revision", "unet_path", "held_out.classifier"):
        return True
    return name.startswith(ARGUMENTS) and isinstance(with_contents(value), Path)


def _is_read(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a run with these settings, by dotted names, reads one of them. Without it they mean the same."""
    block, _, field = name.partition(".")
    if block == "reward_fn_kwargs":
        return field.split(".")[0] in parse_spec(settings["reward_fn"])
    if block == "held_out":
        return field == "every" or settings["held_out.every"] > 0
    if block == "per_prompt_stat_tracking":
        return settings["train.advantage"] == "per_prompt"
    return name not in ("train.lora_rank", "train.lora_targets", "train.kl_coef") or settings["use_lora"]


def _check_contents(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], resume_from: bool) -> None:
    """Raise UserError where a file behind the settings of a run is another than when the run began.

    With `resume_from`, whose settings may differ, only where the setting itself has not changed, and for an adapter to
    start from that is not the one that the run started from: it would have no effect. What an earlier version of this
    program has not recorded is not compared.
    """
    before, now = (dict(_flat(json.loads(json.dumps(settings, default=str)))) for settings in (old, new))
    before = {f"{CONTENTS}.load_from": ""} | before
    for name in sorted(before.keys() & now.keys()):
        block, _, what = name.partition(".")
        if block != CONTENTS or before[name] == now[name]:
            continue
        sources = BEHIND.get(what.split(".")[0], ())
        settings = [key for key in before.keys() | now.keys() if key.split(".")[0] in sources]
        changed = any(before.get(key) != now.get(key) for key in settings) if sources else not now[name]
        if resume_from and changed:
            continue
        advice = "give the one that it was begun with"
        if resume_from and what == "load_from":
            advice = "leave load_from out, since the run continues from its own checkpoint"
        old_print, new_print = (str(settings[name])[:16] or "none" for settings in (before, now))
        raise UserError(
            f"run folder {str(folder)!r} was begun with another {what} (fingerprint {old_print}, now {new_print}); "
            f"{advice}, or another --config.run_name for a new run"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def start_wandb(mode: str, project: str, run_dir: Path, config: dict, run_id: str | None) -> Any:
    """A Weights & Biases run, or None when `mode` is "disabled". Without a key it records offline and never asks."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    import wandb  # here, so that training also runs where it is not installed

    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    return wandb.init(
        project=project,
        name=run_dir.name,
        dir=str(run_dir),
        config=config,
        id=run_id,
        resume="allow" if run_id else None,
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
