"""Runs of the scripts, in this process or in their own; a pytest plugin for its fixtures."""

import csv
import importlib.util
import itertools
import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absl import flags
from common_fixtures import forget
from launching import ROOT, run_script, write_experiment
from ml_collections import config_flags
from PIL import Image

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.utils.training_state import TrainState

PROMPTS = CAPTIONS[6:10]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def save_pictures(folder: Path, *names: str) -> None:
    """Save black images of 8 x 8 px under these names, as PNG whatever their suffix."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, format="PNG")


@contextmanager
def limited(size: int):
    """Limit the size of files: to a process this looks like a full disk or a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def options(config: Path, **fields) -> list[str]:
    """Flags of a script; `metric__batch_size=3` stands for --config.metric.batch_size=3."""
    return [f"--config={config}", *(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())]


def succeed(*arguments, **kwargs) -> subprocess.CompletedProcess:
    result = run_script(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def assert_same_training(one: dict, other: dict, tolerance: float = 1e-3, but: dict | None = None) -> None:
    """Compare the weights of two trainings that differ by rounding alone, tensor by tensor, in the L2 norm.

    Where a gradient is almost 0 its rounding decides a whole step of Adam: single numbers may differ by about the
    learning rate, a tensor as a whole by 3e-5 of its norm at most (measured on several instruction sets). `but` names
    slices to leave out, {end of a name: slice}.
    """
    assert one.keys() == other.keys()
    for name, value in one.items():
        value, difference = value.double(), other[name].double() - value.double()
        for end, part in (but or {}).items():
            if name.endswith(end):
                difference[part] = 0
        assert difference.norm() <= tolerance * value.norm(), name


@contextmanager
def stopped_at_save(number: int, written: bool = True):
    """Interrupt a training when it saves its state for the `number`-th time, after that is `written` or before."""
    save, calls = TrainState.save, itertools.count(1)

    def stop(state, **progress):
        call = next(calls)
        if written or call < number:
            save(state, **progress)
        if call == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainState, "save", stop)
        yield


# absl identifies modules that define the same flag by their id, which a new object may take over from a deleted one
_LOADED = []


def load_module(path: Path | str):
    """Return a file, named from the repository's root, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_under_test", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    _LOADED.append(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr(config_flags, "DEFINE_config_file", lambda *args, **kwargs: None)  # each script defines "config"
        spec.loader.exec_module(module)
    return module


def load_config(name: str):
    return load_module(f"config/{name}.py")


@cache
def load_flag_script(name: str):
    """Return a script as a module with absl flags of its own: scripts define some of the same names."""
    own = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", own)
        for kind in ("string", "multi_string", "list", "enum", "integer", "float", "bool"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(flags, f"DEFINE_{kind}", partial(define, flag_values=own))
        return load_module(f"scripts/{name}")


def call_main(script, *options: str) -> None:
    """Run the main of a script of `load_flag_script` with these options."""
    script.FLAGS.unparse_flags()
    for name in script.FLAGS:
        script.FLAGS[name].unparse()
    script.FLAGS([script.__name__, *options])
    script.main([])


def read_config(config_file: Path | str, fields: dict):
    """Return a file's configuration with changes as for `options`; paths become text."""
    config = load_module(config_file).get_config()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in given.items()})
    return config


def run_in_process(name: str, config_file: Path, fail_if=(), sanity=False, launch="", prompt=(), n=1, **fields) -> None:
    """Run a script's main in this process, with its flags and changes of the configuration as for `options`."""
    config = read_config(config_file, fields)
    module = load_module(f"scripts/{name}")
    given = {"sanity": sanity, "fail_if": fail_if, "launch": launch, "prompt": prompt, "n": n}
    module.FLAGS = SimpleNamespace(config=config, report=False, **given)
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            patch.setenv("HF_HUB_OFFLINE", "1")
            module.main([]) if hasattr(module, "main") else module.train(config)
    finally:
        torch.set_num_threads(threads)
        forget()


@pytest.fixture
def run_flags(monkeypatch, caplog):
    """Function (script, options): run the main of a script with flags in this process; what it logged."""

    def run(name, *options):
        forget()
        caplog.clear()
        call_main(load_flag_script(name), *options)
        return caplog.text

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    caplog.set_level("INFO")
    return run


@pytest.fixture
def run_main():
    return run_in_process


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> dict[int, Path]:
    folder, paths = tmp_path_factory.mktemp("judges"), {}
    for heads in (4, 6):
        torch.manual_seed(heads)
        paths[heads] = folder / f"h{heads}.safetensors"
        save_classifier(ArtifactClassifier(LABELS[:heads], 32, "tinynet_e"), paths[heads])
    return paths


@pytest.fixture(scope="session")
def config_file(tiny_pipeline_dir, judges, tmp_path_factory) -> Path:
    """An experiment with tiny settings and a prompt file of four captions."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "four.txt").write_text("\n".join(PROMPTS))
    fields = {"pretrained.model": str(tiny_pipeline_dir), "sample.num_steps": 3}
    fields |= {"prompt_fn": "from_file", "prompt_fn_kwargs.path": str(folder / "four.txt")}
    fields |= {"eval.num_samples_per_prompt": 3, "eval.batch_size": 5, "eval.classifier": str(judges[6])}
    fields |= {"metric.batch_size": 4, "metric.classifier": str(judges[4])}
    return write_experiment(folder / "tiny.py", fields)
