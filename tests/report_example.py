"""A measurement by metric.py for the tests of the report; a pytest plugin."""

import copy
import json
from pathlib import Path

import pytest
from sample_sets import read, write_samples
from script_tools import run_in_process

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import list_samples
from ddpo_pytorch.utils.files import write_json

SHOWN = CAPTIONS[:10]
MODELS = ("SD", "SD+RL")


def quantity(value: float, half: float, n: int) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "how": "bootstrap"}


def write_run(folder: Path, epochs: int, seed: int) -> Path:
    """Write a run folder of train.py: metrics.jsonl with held-out APR in every fourth epoch, and config.json."""
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(epochs):
        entry = {"epoch": epoch, "reward_mean": 0.7 + 0.01 * epoch, "reward_std": 0.14, "clipfrac": 0.1}
        held_out = {"held_out_apr": 0.15 + 0.01 * epoch, "held_out_reward": 0.76} if epoch % 4 == 3 else {}
        lines.append(json.dumps(entry | {"approx_kl": 2e-6, "grad_norm": 0.02} | held_out))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {"seed": seed, "num_epochs": epochs, "pretrained": {"model": "ddpo_pytorch/assets/mini/sd"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def example(config_file, lively_judge, judges, tmp_path_factory) -> tuple[dict, dict, dict]:
    """(result, samples, runs) of two models, real and training images, with two images of each of ten captions."""
    folder = tmp_path_factory.mktemp("example")
    counts = dict.fromkeys(SHOWN, 2)
    sets = {"real": write_samples(folder / "real", {c: 1 + n % 4 for n, c in enumerate(SHOWN[1:])}, 0)}
    sets |= {name: write_samples(folder / name, counts, seed, drawn=88) for seed, name in enumerate(MODELS, 1)}
    fields = {"folders": ",".join(f"{name}={sets[name]}" for name in MODELS), "real_path": sets["real"]}
    fields |= {"train_path": write_samples(folder / "train", counts, 9), "cache_dir": folder / "cache"}
    write_json(folder / "membership.json", {"title": "Membership", "base": {"AUC": quantity(0.5, 0.04, 90)}})
    fields |= {"results": folder / "membership.json"}
    fields |= {"classifier": lively_judge, "more_judges": f"H6={judges[6]}", "output": folder / "out"}
    run_in_process("metric.py", config_file, **{f"metric__{name}": str(value) for name, value in fields.items()})
    samples = {name: list_samples(path) for name, path in sets.items()}
    runs = {name: write_run(folder / "logs" / name, 32, 42) for name in ("demo", "other-seed")}
    return read(folder / "out"), samples, runs


def minimal(result: dict) -> dict:
    """Return the result of the first model alone, without real and training images, rewards and diversity."""
    model = {key: x for key, x in result["models"]["SD"].items() if not key.startswith(("ceiling", "fidel", "memor"))}
    model |= {"perception": {}, "diversity": {"judge": None}, "reward": None}
    model["missing"] = {"reward": "image_log.json states no rewards"}
    rest = {key: x for key, x in result.items() if key != "real"} | {"results": {}}
    return copy.deepcopy(rest | {"sets": {}, "models": {"SD": model}, "comparisons": [], "warnings": []})
