"""Made-up measurements for the tests of the report: invented numbers, drawn phantoms, log files."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpo_pytorch.data.isic import CAPTIONS, LABELS, labels_of
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.phantoms.skin import draw

HOW = "bootstrap over prompts and images, 2,000 resamples"
MODELS = ("SD", "SD+RL")


def quantity(value: float, half: float, n: int, how: str = HOW) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "how": how}


def ratio(value: float, half: float, n: int) -> dict:
    return quantity(value, half, n) | {"low": max(value - half, 0.0), "high": min(value + half, 1.0)}


def write_images(folder: Path, captions: Sequence[str], number: int, size: int, seed: int, wrong: float = 0.0, stem=""):
    """Write a sample folder of phantoms, a share `wrong` with a wrong artifact; return (file, caption) pairs."""
    rng, samples = np.random.default_rng(seed), []
    for caption, index in itertools.product(captions, range(number)):
        labels = list(labels_of(caption))
        if rng.random() < wrong:
            flip = rng.integers(4)
            labels[flip] = 1 - labels[flip]
        path = folder / "images" / folder_name(caption) / f"{stem}{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # the same stream for both models: the same patient, so that columns look like one noise
        noise = np.random.default_rng((CAPTIONS.index(caption), index))
        Image.fromarray(draw(labels, noise, size)).save(path)
        samples.append((path, caption))
    return samples


def write_run(folder: Path, epochs: int, seed: int, gain: float = 0.14) -> Path:
    """Write a run folder of train.py: metrics.jsonl with held-out APR in every fourth epoch, and config.json."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(epochs):
        rise = 1 - math.exp(-4 * epoch / epochs)
        entry = {"epoch": epoch, "reward_mean": 0.765 + gain * rise + 0.006 * rng.standard_normal()}
        entry |= {"reward_std": 0.14 - 0.05 * rise, "clipfrac": 0.1 + 0.1 * rng.random()}
        entry |= {"approx_kl": 2e-6 * (1 + rng.random()), "grad_norm": 0.02 + 0.01 * rng.random(), "seconds": 14.0}
        if epoch % 4 == 3:
            entry |= {"held_out_apr": 0.15 + 2.2 * gain * rise, "held_out_reward": 0.76 + gain * rise}
        lines.append(json.dumps(entry))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {"seed": seed, "num_epochs": epochs, "reward_fn": "isic_classifier_reward"}
    config |= {"pretrained": {"model": "ddpo_pytorch/assets/mini/sd"}, "train": {"learning_rate": 2.5e-3}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sha(number: int) -> str:
    return f"{number:064x}"


def alignment(aprs: dict[str, float], n: int, labels: Sequence[str]) -> dict:
    """Return a judge's block of one model."""
    mean = sum(aprs.values()) / len(aprs)
    rates = {"precision": quantity(0.62 + 0.3 * mean, 0.06, n), "recall": quantity(0.5 + 0.4 * mean, 0.05, n)}
    found = dict.fromkeys(labels, rates | {"requested": n // 2, "seen": abs(n // 2 - 17)})
    by_prompt = {caption: ratio(apr, 0.12, n // 32) for caption, apr in aprs.items()}
    return {"APR": quantity(mean, 0.035, n), "by_prompt": by_prompt, "attributes": found}


def model(name: str, folder: Path, train: list, samples: list, seed: int) -> dict:
    """Return one model's block, better for SD+RL in APR and worse in diversity."""
    rl, rng, n = name == "SD+RL", np.random.default_rng(seed), 512
    aprs = {c: float(np.clip((0.47 if rl else 0.14) + rng.normal(0, 0.15), 0, 1)) for c in CAPTIONS}
    h4, h6 = alignment(aprs, n, LABELS[:4]), alignment({c: 0.8 * v for c, v in aprs.items()}, n, LABELS)
    fid, kid = (84.31 if rl else 91.07), (0.0412 if rl else 0.0467)
    matched = {"n": 480, "FID": quantity(fid, 3.1, 480), "KID": quantity(kid, 0.004, 480)}
    for key, value in {"precision": 0.61, "recall": 0.22, "density": 0.54, "coverage": 0.41}.items():
        matched[key] = quantity(value, 0.03, 480)
    unmatched = {"n": n, "n_real": 1281, "FID": quantity(fid + 9, 2.9, n), "KID": quantity(kid + 0.01, 0.004, n)}
    judged = {"n": 480, "FID": quantity(0.274 if rl else 0.292, 0.02, 480)}
    closest = [
        {"path": str(path), "caption": caption, "train": str(other), "distance": 0.21 + 0.013 * index}
        for index, ((path, caption), (other, _)) in enumerate(zip(samples[::7][:16], train, strict=False))
    ]
    made_with = {"seed": 88, "num_steps": 10, "weights_sha256": sha(seed), "prompts": list(CAPTIONS)}
    vendi, distance = quantity(4.12 if rl else 6.31, 0.2, n), quantity(0.31 if rl else 0.44, 0.02, n)
    closer = {"share_closer": quantity(0.027 if rl else 0.012, 0.009, n), "threshold": 0.2071, "copies": 0}
    return {
        "folders": [{"path": str(folder), "images": n, "sha256": sha(seed + 7), "made_with": made_with}],
        "images": n,
        "black_images": 0,
        "reward": 0.908 if rl else 0.764,
        "APR": h4["APR"]["value"],
        "APR_by_prompt": aprs,
        "ceiling": ratio(0.887, 0.03, 1281),
        "ceiling_share": 29 / 32,
        "missing": {},
        "images_by_prompt": dict.fromkeys(CAPTIONS, 16),
        "alignment": {"H4": h4, "H6": h6},
        "fidelity": {
            "inception": {"matched": matched, "unmatched": unmatched},
            "judge": {"matched": judged, "unmatched": {"n": n}},
        },
        "perception": {},
        "diversity": {"judge": {"vendi": vendi, "pairwise_distance": distance}},
        "memorisation": {"judge": closer | {"closest": closest}},
    }


def full_example(folder: Path, size: int = 64, number: int = 6) -> tuple[dict, dict, list[Path]]:
    """Return (result, samples, runs) with nearly everything that can be measured; images of `size` px in `folder`."""
    counts = {c: (3 * i * i) % 41 for i, c in enumerate(CAPTIONS)}  # several captions without a real image
    real = []
    for caption in CAPTIONS:
        real += write_images(folder / "real", [caption], min(counts[caption], number), size, 1, stem="PHANTOM_")
    train = write_images(folder / "train", CAPTIONS[::2], 1, size, 2)
    samples = {"real": real}
    for seed, (name, wrong) in enumerate(zip(MODELS, (0.8, 0.4), strict=True), 3):
        samples[name] = write_images(folder / name, CAPTIONS, number, size, seed, wrong)
    models = {name: model(name, folder / name, train, samples[name], seed) for seed, name in enumerate(MODELS, 3)}
    aprs = [models[name]["APR"] for name in MODELS]
    comparison = {"from": "SD", "to": "SD+RL", "from_APR": aprs[0], "to_APR": aprs[1], "prompts": 32}
    comparison |= {"APR": quantity(aprs[1] - aprs[0], 0.04, 512), "paired": True, "reason": "", "pairs": 512}
    comparison |= {"p": 0.0001, "p_by_prompt": 0.0002, "gained": 190, "lost": 21, "test": "p: McNemar, exact"}
    images = sum(counts.values())
    result = minimal_result() | {
        "missing": {"LPIPS": "no AlexNet weights; give --config.metric.alexnet=FILE"},
        "warnings": ["FID of SD rests on 480 images, fewer than 2,048; its bias is large"],
        "models": models,
        "real": {
            "images": images,
            "alignment": {"H4": alignment(dict.fromkeys(CAPTIONS, 0.915), images, LABELS[:4])},
            "perception": {},
            "diversity": {"judge": {"vendi": quantity(7.9, 0.3, 640)}},
        },
        "sets": {
            "real": {"path": str(folder / "real"), "images": images, "sha256": sha(1), "images_by_prompt": counts},
            "train": {"path": str(folder / "train"), "images": len(train), "sha256": sha(2), "identical_images": 2}
            | {"images_by_prompt": {c: int(c in CAPTIONS[::2]) for c in CAPTIONS}},
        },
        "comparisons": [comparison],
    }
    result["settings"] |= {"classifier": "ddpo_pytorch/assets/mini/H4.safetensors", "image_shape": [size, size]}
    result["judges"]["H6"] = {"what": "assets/mini/H6.safetensors", "sha256": sha(6), "labels": list(LABELS)}
    result["networks"]["inception"] = {"what": "Inception V3 of FID", "sha256": sha(9)}
    runs = [write_run(folder / "logs" / "demo", 32, 42), write_run(folder / "logs" / "other-seed", 32, 1, 0.11)]
    return result, samples, runs


def minimal_result() -> dict:
    """Return the result of one folder without real and training images, and without weights of Inception or AlexNet."""
    captions = list(CAPTIONS[:2])
    missing = {"LPIPS": "metric.alexnet is empty", "FID, KID, LPIPS to real images": "metric.real_path is empty"}
    images = {"images": 3, "sha256": sha(3), "made_with": {}, "black_images": 0, "identical_images": 0}
    model = {
        "images": 3,
        "APR": 0.25,
        "reward": None,
        "black_images": 0,
        "alignment": {"H4": alignment(dict.fromkeys(captions, 0.25), 3, LABELS[:4])},
        "perception": {},
        "diversity": {"judge": None},
        "missing": {"reward": "image_log.json states no rewards"},
        "images_by_prompt": dict.fromkeys(CAPTIONS, 0) | {captions[0]: 2, captions[1]: 1},
        "folders": [images | {"path": "samples"}],
    }
    return {
        "format": 2,
        "fid_part": "matched",
        "created": "2026-03-01T12:00:00Z",
        "versions": {"torch": "2.9.0"},
        "settings": {"classifier": "H4.safetensors", "quality": [], "seed": 42, "image_shape": [64, 64]},
        "judges": {"H4": {"what": "H4.safetensors", "sha256": sha(4), "labels": list(LABELS[:4])}},
        "networks": {},
        "missing": missing,
        "warnings": [],
        "sets": {},
        "models": {"SD": model},
        "comparisons": [],
    }


def fundus_result() -> dict:
    """Return the result of two models and real images, judged by Selector and Policy, with image statistics."""
    result, prompts = minimal_result(), {"a fundus photograph": 3}
    models = {}
    for name, value, sharpness in (("SD", 0.4, 0.4), ("SD+RL", 0.55, 0.5), ("real", 0.7, 0.7)):
        judged = dict.fromkeys(("selector", "pass_rate", "policy", "alignment"), quantity(value, 0.1, 3))
        statistics = {"mean": quantity(sharpness, 0.1, 3), "sd": 0.1}
        if name != "real":
            statistics |= {"difference": quantity(sharpness - 0.7, 0.1, 3), "standardised": quantity(-1.5, 0.1, 3)}
            statistics |= {"wasserstein": 1.6}
        block = {"images": 3, "no_field": 2 * (name == "real"), "statistics": {"sharpness": statistics}}
        models[name] = result["models"]["SD"] | {
            "alignment": {"fundus": judged | {"by_prompt": dict.fromkeys(prompts, quantity(value, 0.1, 3))}},
            "images_by_prompt": prompts,
            "quality": {"legacy": block},
        }
    rates = {"from_alignment": 0.4, "to_alignment": 0.55, "alignment": quantity(0.15, 0.1, 3)}
    pairs = {"paired": True, "reason": "", "pairs": 3, "gained": 3, "lost": 0, "p": 0.01, "p_by_prompt": None}
    result["settings"] |= {"quality": ["legacy"], "classifier": ""}
    facts = {"path": "real", "images": 3, "sha256": sha(1), "images_by_prompt": prompts}
    return result | {
        "kind": "fundus",
        "judges": {name: {"what": name, "sha256": sha(5), "labels": []} for name in ("selector", "policy")},
        "real": models.pop("real"),
        "models": models,
        "sets": {"real": facts},
        "comparisons": [{"from": "SD", "to": "SD+RL", "prompts": 1} | rates | pairs],
    }
