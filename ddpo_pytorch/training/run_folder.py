"""The folder of a training run: its lock, its settings, and the checkpoint from which a command may resume there."""

import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers

from ddpo_pytorch.rewards import parse_spec
from ddpo_pytorch.training import checkpoints as saved
from ddpo_pytorch.utils.errors import UserError, difference, one_line
from ddpo_pytorch.utils.files import LOCK, locked, path_inside, rename_with, write_file
from ddpo_pytorch.utils.fingerprint import with_contents
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.settings import flat

CONFIG = "config.json"
STOPPING = {"num_epochs", "early_stop", "held_out.patience", "held_out.tolerance"}
FREE = {  # settings that may change when a run resumes, since they do not change what an epoch does
    # locations; contents, also of load_from, are compared separately
    *("base_log_path", "logdir", "run_name", "resume_from", "load_from", "contents"),
    *STOPPING,
    *("save_freq", "num_checkpoint_limit", "log_with", "wandb_project", "log_images", "progress"),  # what is logged
    *("process_timeout", "dataset", "eval", "metric", "sd", "rlhf", "improve"),  # blocks of other scripts
}
ARGUMENTS = ("prompt_fn_kwargs.", "reward_fn_kwargs.")
# paths that are compared by content; config.json keeps the fingerprints under CONTENTS
BY_CONTENT = ("pretrained.model", "pretrained.revision", "unet_path", "held_out.classifier")
CONTENTS = "contents"
BEHIND = {  # settings that determine the content, by the first part of a fingerprint's name
    "model": ("pretrained", "unet_path", "mixed_precision", "use_lora"),
    "reward": ("reward_fn", "reward_fn_kwargs"),
    "prompts": ("prompt_fn", "prompt_fn_kwargs"),
}

logger = logging.getLogger(__name__)


def open_run(held: ExitStack, settings: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """Lock a run's folder; return it with the checkpoint to resume from, or None for a new run. Main process only.

    The folder is `<logdir>/<run_name>` (date and time without a name). If it exists, the run resumes from its newest
    undamaged checkpoint, provided that `settings` are those it was started with (except for those in `FREE`).
    `resume_from`, a run or checkpoint folder, resumes with any settings in the folder of that checkpoint, which must be
    the newest undamaged one, so that nothing is overwritten. Damaged newer ones are quarantined.

    The lock is held until `held` is closed. Raises UserError for a folder that another run is writing, for other
    settings (naming the first), for a file behind them that has changed, and as `find_checkpoint` does.
    """
    logdir, run_name, resume_from = (settings[name] for name in ("logdir", "run_name", "resume_from"))
    if resume_from:
        given = Path(resume_from).absolute()
        if not (given.parent / CONFIG).is_file():  # a link to a checkpoint from outside its run
            given = given.resolve()
        folder = given.parent if saved.is_checkpoint(given) else given
        if not saved.is_checkpoint(given) and not _holds_checkpoint(given):
            saved.find_checkpoint(given)  # raises, saying what is missing
        held.enter_context(locked(folder, "another run"))
        checkpoint = saved.find_checkpoint(given)
        old: dict[str, Any] = {}
        with suppress(UserError):  # a checkpoint may have been copied alone
            old = _last_settings(folder)
        _check_contents(folder, old, settings, resume_from=True)
        if run_name and Path(run_name).name != folder.resolve().name:
            logger.info("run_name %r is not used: resume_from continues a run in its own folder", run_name)
    else:
        folder = path_inside(logdir, run_name or time.strftime("%Y.%m.%d_%H.%M.%S"), "run_name")
        held.enter_context(locked(folder, "another --config.run_name"))
        checkpoint = _checkpoint_to_resume(folder, settings)
    for newer in saved.checkpoints(folder) if checkpoint else ():
        if saved.epochs_completed(newer) > saved.epochs_completed(checkpoint):
            if saved.find_damage(newer) is None:
                problem = f"is not the newest checkpoint of its run; continuing would overwrite {newer.name}"
                raise UserError(f"{str(checkpoint)!r} {problem}: resume from that, or copy yours to another folder")
            saved.quarantine(newer)
    return folder, checkpoint


def _checkpoint_to_resume(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    if not any(path.name != LOCK for path in folder.iterdir()):
        return None
    old, run = _last_settings(folder), f"run folder {str(folder)!r}"
    if changed := difference(*comparable(old, settings)):
        advice = f"another --config.run_name for a new run, or --config.resume_from={folder} to use the new settings"
        raise UserError(f"{run} exists already and was started with {changed}; give the same value to resume, {advice}")
    _check_contents(folder, old, settings, resume_from=False)
    if _holds_checkpoint(folder):
        return saved.find_checkpoint(folder)
    log = folder / "metrics.jsonl"
    if log.is_file() and log.read_bytes().count(b"\n") > old.get("save_freq", 1):
        raise UserError(f"the checkpoints of {run} are gone; choose another --config.run_name, or move it")
    logger.info("%s has no checkpoint yet: starting from scratch", folder)
    return None


def _holds_checkpoint(folder: Path) -> bool:
    return bool(saved.checkpoints(folder)) or (folder / saved.BEST).is_dir()


def write_settings(folder: Path, settings: Mapping[str, Any], epoch: int, resumed: bool) -> None:
    """Write config.json, or config_<epochs completed>.json if a run is resumed with other settings."""
    text = json.dumps(settings, indent=1, default=str) + "\n"
    for path in _settings_files(folder) if resumed else ():
        number = re.fullmatch(r"config_(\d+)\.json", path.name)
        if number and int(number[1]) > epoch:  # of epochs whose checkpoints are gone
            rename_with(path, "superseded")
    if resumed and (files := _settings_files(folder)) and files[-1].read_bytes() == text.encode():
        return
    write_file(folder / (f"config_{epoch:04d}.json" if resumed else CONFIG), text, durable=True)


def _settings_files(folder: Path) -> list[Path]:
    """Return config.json, followed by the files of later starts."""
    return [path for path in (folder / CONFIG, *sorted(folder.glob("config_*.json"))) if path.is_file()]


def _last_settings(folder: Path) -> dict[str, Any]:
    files = _settings_files(folder)
    try:
        return read_json(files[-1], {"save_freq?": int, f"{CONTENTS}?": {str: str}})
    except (IndexError, UserError) as error:
        problem = f"its {files[-1].name} is damaged" if files else f"it holds no {CONFIG}"
        advice = (
            f"choose another --config.run_name, give --config.resume_from={folder} if it has a checkpoint, or move it"
        )
        raise UserError(f"run folder {str(folder)!r} exists already, and {problem}; {advice}") from error


def comparable(old: Mapping, new: Mapping, free: Collection[str] = FREE) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of both configurations that must be equal, by dotted name.

    Not compared are fields that only one of them has (they belong to another version of this program), except keyword
    arguments of prompt functions and rewards; `free` fields, and those that this run does not read; and paths whose
    content is compared instead (`_check_contents`).
    """
    left, right = _flat(old), _flat(new)

    def is_compared(name: str) -> bool:
        block, _, field = name.partition(".")
        if name in free or block in free or not (name.startswith(ARGUMENTS) or (name in left and name in right)):
            return False
        if old.get(CONTENTS):
            argument = name.startswith(ARGUMENTS) and isinstance(with_contents(right.get(name)), Path)
            if argument or name in BY_CONTENT:
                return False
        if block == "reward_fn_kwargs":
            return field.split(".")[0] in parse_spec(right["reward_fn"])
        if block == "held_out":
            return field == "every" or right["held_out.every"] > 0
        if block == "per_prompt_stat_tracking":
            return right["train.advantage"] == "per_prompt"
        return right["use_lora"] or name not in ("train.lora_rank", "train.lora_targets", "train.kl_coef")

    names = list(filter(is_compared, left | right))
    return {name: left.get(name) for name in names}, {name: right.get(name) for name in names}


def _check_contents(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], resume_from: bool) -> None:
    """Raise UserError if a file behind the settings has changed since the run began.

    With `resume_from`, settings may change, so only files whose setting is unchanged are compared; and `load_from` is
    refused unless the run started from it, since it would have no effect.
    """
    new = json.loads(json.dumps(new, default=str))
    before, now = {"load_from": ""} | old.get(CONTENTS, {}), new[CONTENTS]
    for name in sorted(before.keys() & now.keys()):
        sources = BEHIND.get(name.split(".")[0])
        if name == "model.unet" and not new["use_lora"]:
            sources += ("load_from",)  # which replaces the whole UNet
        other_setting = any(old.get(key) != new.get(key) for key in sources) if sources else not now[name]
        if before[name] == now[name] or (resume_from and other_setting):
            continue
        advice = "give the original one, or another --config.run_name for a new run"
        if resume_from and name == "load_from":
            advice = "leave load_from out, since the run continues from its own checkpoint"
        fingerprints = f"fingerprint {before[name][:16] or 'none'}, now {now[name][:16] or 'none'}"
        what = name
        if name.endswith(".code"):
            what, advice = f"code of {sources[0]} {new[sources[0]]!r}", advice.replace("give", "restore")
        raise UserError(f"run folder {str(folder)!r} was started with another {what} ({fingerprints}); {advice}")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name, with their values as read back from JSON."""
    return flat(json.loads(json.dumps(settings, default=str)))


def parse_trackers(log_with: str) -> list[LoggerType]:
    """Return Accelerate's trackers named in `log_with`, e.g. "wandb,tensorboard"; "" names none.

    With WANDB_MODE=disabled, W&B is left out. Raises UserError for a tracker that is unknown or not installed.
    """
    try:
        trackers = [LoggerType(name.strip()) for name in log_with.split(",") if name.strip()]
    except ValueError as error:
        raise UserError(f"log_with is {log_with!r}; allowed are {', '.join(LoggerType.list()[1:])}") from error
    if missing := [name for name in map(str, trackers) if name not in map(str, get_available_trackers())]:
        raise UserError(f"log_with names {', '.join(missing)}, which is not installed; install it, or leave it out")
    return [name for name in trackers if name != LoggerType.WANDB or os.environ.get("WANDB_MODE") != "disabled"]


def start_trackers(
    accelerator: Accelerator, log_with: str, project: str, run_dir: Path, config: dict, wandb_id: str | None
) -> str | None:
    """Start the trackers on the main process, W&B offline without an API key; return the id of the W&B run, if any."""
    trackers = parse_trackers(log_with)
    if not trackers or not accelerator.is_main_process:
        return wandb_id
    logins = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    keys = os.environ.get("WANDB_API_KEY") or (logins.is_file() and "wandb" in logins.read_text())
    if LoggerType.WANDB in trackers and not keys:
        os.environ.setdefault("WANDB_MODE", "offline")
    options = {"name": run_dir.name, "dir": str(run_dir), "id": wandb_id, "resume": "allow" if wandb_id else None}
    accelerator.log_with, accelerator.project_configuration.logging_dir = trackers, str(run_dir)
    plain = bool | int | float | str
    values = {name: value if isinstance(value, plain) else str(value) for name, value in _flat(config).items()}
    try:
        accelerator.init_trackers(project, config=values, init_kwargs={"wandb": options})
    except Exception as error:  # each tracker has its own kinds
        problem = f"log_with={log_with!r}, wandb_project={project!r}: cannot be started ({one_line(error)})"
        raise UserError(f"{problem}; correct it, or set --config.log_with=") from error
    return accelerator.get_tracker("wandb", unwrap=True).id if LoggerType.WANDB in trackers else wandb_id
