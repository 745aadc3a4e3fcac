"""Each file of JSON that a command reads, with content of every wrong kind: one line that names the file."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpo_pytorch.data.sample_folder import read_entries, read_log, read_settings
from ddpo_pytorch.data.splits import read_splits
from ddpo_pytorch.generator import pipeline
from ddpo_pytorch.generator.from_scratch import build_unet, build_vae
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, write_index
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.judges.selector import Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms import skin as phantom
from ddpo_pytorch.report.curves import read_config, read_runs
from ddpo_pytorch.rlhf.rounds import RoundMetrics, read_history
from ddpo_pytorch.training import run_folder
from ddpo_pytorch.training.checkpoints import epochs_completed, find_damage
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.json_files import COUNT, OneOf, parse_json, read_json

CONTENTS = {
    "empty": b"",
    "torn": b'{"epoch": 3, "fil',
    "null": b"null",
    "list of numbers": b"[1, 2]",
    "deep": b"[" * 10**6,
    "huge": b'{"epoch": ' + b"9" * 5000 + b"}",
    "twice": b'{"epoch": 1, "epoch": 2}',
    "bytes": bytes(range(256)),
}


def refused(path: Path):
    return pytest.raises(UserError, match=rf"^[^\n]{{0,800}}{re.escape(path.name)}[^\n]{{0,800}}$")


def check(reader, folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with refused(folder / name):
        reader(folder)


def unreadable(reason: str | None) -> None:
    if reason:
        raise UserError(reason)


def runs(folder: Path):
    for name in ("metrics.jsonl", "held_out.jsonl"):
        path = folder / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b'\n{"epoch": 0}\n')
    read_runs({"run": folder})


READERS = {
    "progress": ("progress.json", lambda folder: epochs_completed(folder)),
    "manifest": ("manifest.json", lambda folder: unreadable(find_damage(folder))),
    "config": ("config.json", read_config),
    "last config": ("config.json", run_folder._last_settings),
    "metrics": ("metrics.jsonl", runs),
    "held out": ("held_out.jsonl", runs),
    "image log": ("image_log.json", read_log),
    "merged log": ("image_log.json", read_entries),
    "settings": ("settings.json", read_settings),
    "splits": ("splits.json", lambda folder: read_splits({"train": folder / "isic_train.csv"})),
    "conditioning": ("conditioning.json", pipeline._read_record),
    "phantom world": ("world.json", lambda folder: phantom.write_world(folder, 1, 1, 1, seed=0)),
    "fundus world": ("world.json", lambda folder: retina.write_world(folder, 2, 2, 2, seed=0)),
    "index": ("index.json", LatentShards),
}


@pytest.mark.parametrize("reader", READERS)
def test_another_content_is_refused(tmp_path, reader):
    name, read = READERS[reader]
    for content in CONTENTS:
        if reader not in ("metrics", "held out") or content != "empty":  # an empty log is whole
            check(read, tmp_path, name, CONTENTS[content])


FIELDS = [
    ("progress", {"epoch": "3"}),
    ("progress", {"epoch": -3}),
    ("progress", {"epoch": 1, "tracker": {"rewards": [["a", ["b"]]]}}),
    ("progress", {"epoch": 1, "plateau": {"previous": math.nan, "quiet_epochs": 0}}),
    ("progress", {"epoch": 1, "held_out": {"best": 3, "last": None, "collapsed": 0, "fingerprint": None}}),
    ("manifest", {"files": []}),
    ("manifest", {"files": {"progress.json": {"bytes": "3", "sha256": "x"}}}),
    ("last config", {"save_freq": "often"}),
    ("metrics", {"epoch": "3"}),
    ("held out", {"epoch": [3]}),
    ("image log", [{"path_to_img": 3}]),
    ("image log", [{"path_to_img": "a", "prompt": {}}]),
    ("settings", {"settings": []}),
    ("splits", {"files": {"isic_train.csv": "hash"}}),
    ("conditioning", {"text_encoder_sha256": 1, "files": {}}),
    ("index", {"captions": [1], "images": 1, "shards": []}),
    ("index", {"captions": ["a"], "images": 0, "shards": []}),
    ("index", {"captions": ["a"], "images": 10**9, "shards": [{"file": 1, "sha256": "x"}]}),
]


def test_another_field_is_refused(tmp_path):
    for number, (reader, value) in enumerate(FIELDS):
        (folder := tmp_path / str(number)).mkdir()
        name, read = READERS[reader]
        check(read, folder, name, json.dumps(value).encode())


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder, vae = tmp_path_factory.mktemp("latents"), build_vae((8, 8), 16)
    images = [(torch.zeros(3, 16, 16, dtype=torch.uint8), index) for index in range(3)]
    encode_data_set(vae, images, [4, 5, 6], [0, 1, 0], folder, progress=False)
    write_index(folder, vae, ["a", "b"], 3, {})
    assert len(LatentShards(folder)) == 3
    return folder


def test_latents_that_training_could_not_take_are_refused_at_the_start(latents, tmp_path):
    for change in (
        {"caption": torch.tensor([0, 1, 2])},
        {"caption": torch.tensor([0.0, 1.0, 0.0])},
        {"caption": None},
        {"row": torch.zeros(2, dtype=torch.int64)},
        {"mean": torch.zeros(2, 4, 8, 8).half()},
        {"mean": torch.zeros(3).half(), "logvar": torch.zeros(3).half()},
    ):
        shard = load_file(latents / "shard_00000.safetensors") | change
        shard = {name: value for name, value in shard.items() if value is not None}
        save_file(shard, tmp_path / "shard_00000.safetensors")
        write_index(tmp_path, build_vae((8, 8), 16), ["a", "b"], 3, {})
        with pytest.raises(UserError, match="index.json"):
            LatentShards(tmp_path)


def rewritten(path: Path, out: Path, kind: str, **changes) -> Path:
    """The file with other fields in its description."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[kind])
    for name, value in changes.items():
        field, _, inner = name.partition("__")
        about[field] = about[field] | {inner: value} if inner else value
    save_file(load_file(path), out, metadata={kind: json.dumps(about)})
    return out


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judge")
    save_classifier(ArtifactClassifier(("hair", "ink"), 32, "tinynet_e"), folder / "artifact_classifier.safetensors")
    save_selector(Selector(VisionSizes(16, 8, 16, 1, 2)), folder / "selector.safetensors")
    return {path.stem: path for path in folder.iterdir()}


LOADERS = {"artifact_classifier": load_classifier, "selector": load_selector}
IMPOSSIBLE = {
    "artifact_classifier": {
        "image_size": (10**9, 0, "32", 32.5, None, True, 1e400),
        "labels": ("hair", None, [], ["hair", 3], ["hair"], ["hair"] * 2, [str(n) for n in range(10**5)]),
        # the last one would be gigabytes, if it were built
        "arch": (3, "nonsense", "../x", "hf-hub:a/b", "efficientnet_b0", "vit_giant_patch14_dinov2"),
        "thresholds": (3, *({"hair": bad} for bad in ("x", None, 2, math.nan)), {"other": 0.5}),
    },
    "selector": {
        "sizes__image_size": (10**9, -8, "16", 16.0),
        "sizes__width": (8192, 0),
        "sizes__layers": (2, 10**9, -1),
        "sizes__heads": (0, 5),
        "sizes__dropout": (1, math.nan),
        "sizes__mlp_ratio": (10**9, 0, math.inf),
        "sizes__stem": ("other", 3),
        "sizes__backbone": (3, "nonsense", "../x", "hf-hub:a/b", "test_efficientnet"),
        "sizes__unknown": (3,),
        "sizes": (None, [16, 8]),
        "threshold": ("0.5", math.nan, [0.5], True),
        "calibration": (3,),
        "origin": ("x",),
    },
}


@pytest.mark.parametrize("kind", LOADERS)
def test_judges_with_impossible_descriptions_are_refused(judges, tmp_path, kind):
    for field, value in ((field, value) for field, values in IMPOSSIBLE[kind].items() for value in values):
        path = rewritten(judges[kind], tmp_path / "x.safetensors", kind, **{field: value})
        with refused(path):
            LOADERS[kind](path)


@pytest.mark.parametrize("kind", LOADERS)
def test_descriptions_of_another_kind_are_refused(judges, tmp_path, kind):
    for content in ("torn", "list of numbers", "deep"):
        path = tmp_path / "x.safetensors"
        save_file(load_file(judges[kind]), path, metadata={kind: CONTENTS[content].decode("latin-1")})
        with refused(path):
            LOADERS[kind](path)


def test_adapter_configurations_of_another_kind_are_refused(tmp_path):
    unet = build_unet((16,), (True,), 16, 8)
    name, layer = next((name, module) for name, module in unet.named_modules() if name.endswith("to_q"))
    pair = {"lora_A": torch.zeros(4, layer.in_features), "lora_B": torch.zeros(layer.out_features, 4)}
    adapter = {f"{name}.{part}.weight": value for part, value in pair.items()}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    for text in ('{"r": "4", "lora_alpha": 4}', '{"r": 4, "lora_alpha": NaN}', '{"r": -4}', "[]"):
        (tmp_path / "adapter_config.json").write_text(text)
        with refused(tmp_path / "adapter_config.json"):
            load_lora(unet, tmp_path)


def test_rounds_are_read_up_to_the_first_that_is_missing(tmp_path):
    path = tmp_path / "rounds.jsonl"
    entry = dict.fromkeys(RoundMetrics.__dataclass_fields__, 0.5) | {"guards": {"vessels": [0.1, 0.02]}}
    path.write_text("".join(json.dumps(entry | {"round": number}) + "\n" for number in (0, 1, 3)))
    assert len(read_history(path)) == 2
    for bad in ({"round": "0"}, {"round": 0, "kid": None}, {"round": 0, "guards": {"vessels": [0.1]}}, None):
        path.write_text((json.dumps(entry | bad) if bad else "[" * 10**5) + "\n")
        with refused(path):
            read_history(path)


SHAPE = {
    "epoch": COUNT,
    "tracker?": {"rewards": [(OneOf((str, int)), [float])]},
    "best?": OneOf(({"apr": float}, None)),
    "scores?": {str: float},
    "done?": bool,
}
GOOD = [
    {"epoch": 0},
    {"epoch": 3, "other": {"any": [None, 1e5]}, "best": None, "done": True},
    {"epoch": 3, "best": {"apr": 1}, "scores": {"a": 0.5, "b?": 2}, "tracker": {"rewards": [["ä", [1, 0.5]], [3, []]]}},
]
BAD = {
    "not text": (b"\xff\xfe\x00", "JSON"),
    "missing": ('{"epochs": 3}', "'epoch' is missing"),
    "bool": ('{"epoch": true}', "'epoch' is True"),
    "beyond Python's digits": ('{"epoch": 1, "x": %s}' % ("9" * 10_000), "64 bits"),
    "deep lists": ("[" * 10**6, "nested"),
    "deep objects": ('{"epoch": 1, "x": ' + '{"x": ' * 100 + "1" + "}" * 101, "nested"),
    "twice": ('{"epoch": 1, "x": [{"y": 1, "y": 1}]}', "'y' appears twice"),
    "surrogate": ('{"epoch": 1, "x": "\\ud800"}', "Unicode"),
    "nan": ('{"epoch": 1, "best": {"apr": NaN}}', "'best'"),
    "infinite": ('{"epoch": 1, "scores": {"a?": 1e999}}', "'scores'.'a?' is inf"),
    "no list": ('{"epoch": 1, "tracker": {"rewards": {}}}', "'tracker'.'rewards' is {}"),
    "too short": ('{"epoch": 1, "tracker": {"rewards": [["a"]]}}', "'tracker'.'rewards'[0]"),
    "an element": ('{"epoch": 1, "tracker": {"rewards": [["a", [1]], ["b", [1, null]]]}}', "[1][1][1] is None"),
}


@pytest.mark.parametrize("value", GOOD)
def test_a_value_that_fits_is_returned(tmp_path, value):
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json", SHAPE) == value
    assert parse_json(str(2**64 - 1), int, "x") == 2**64 - 1  # a seed


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_does_not_fit_is_named(tmp_path, case):
    text, said = BAD[case]
    path = tmp_path / "progress.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_json(path, SHAPE, "do this")
    message = str(caught.value)
    assert message.startswith(f"{str(path)!r} ") and said in message and message.endswith("; do this")
    assert "\n" not in message and len(message) < 500 + len(str(path))
