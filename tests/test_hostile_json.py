"""Each file of JSON that a command reads, with content of every wrong kind: one line that names the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_tools import load_module

from ddpo_pytorch.data.sample_folder import logged, read_log, read_settings
from ddpo_pytorch.data.splits import read_splits
from ddpo_pytorch.generator import conditioning
from ddpo_pytorch.generator.from_scratch import build_unet, build_vae
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, write_index
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.judges.selector import Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms import skin as phantom
from ddpo_pytorch.report.curves import read_runs
from ddpo_pytorch.report.provenance import read_config
from ddpo_pytorch.training import run_folder
from ddpo_pytorch.training.checkpoints import epochs_completed, fault
from ddpo_pytorch.utils.errors import UserError

CONTENTS = {
    "empty": b"",
    "torn": b'{"epoch": 3, "fil',
    "null": b"null",
    "number": b"3",
    "text": b'"x"',
    "list of numbers": b"[1, 2]",
    "deep": b"[" * 10**6,
    "deep, whole": b'{"epoch": ' + b"[" * 900 + b"]" * 900 + b"}",
    "huge": b'{"epoch": ' + b"9" * 5000 + b"}",
    "twice": b'{"epoch": 1, "epoch": 2}',
    "bytes": bytes(range(256)),
    "zeros": bytes(100),
}


def check(reader, folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        reader(folder)
    assert "\n" not in str(caught.value) and Path(name).name in str(caught.value)


def unreadable(reason: str | None) -> None:
    if reason:
        raise UserError(reason)


def runs(folder: Path):
    for name in ("metrics.jsonl", "held_out.jsonl"):
        path = folder / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b'\n{"epoch": 0}\n')
    read_runs([folder])


def splits(folder: Path):
    read_splits({"train": folder / "isic_train.csv"})


READERS = {
    "progress": ("progress.json", lambda folder: epochs_completed(folder, stated=True)),
    "manifest": ("manifest.json", lambda folder: unreadable(fault(folder))),
    "config": ("config.json", read_config),
    "last config": ("config.json", run_folder._last_settings),
    "metrics": ("metrics.jsonl", runs),
    "held out": ("held_out.jsonl", runs),
    "image log": ("image_log.json", read_log),
    "merged log": ("image_log.json", logged),
    "settings": ("settings.json", read_settings),
    "splits": ("splits.json", splits),
    "conditioning": ("conditioning.json", conditioning._record),
    "phantom world": ("world.json", lambda folder: phantom.write_world(folder, 1, 1, 1, seed=0)),
    "fundus world": ("world.json", lambda folder: retina.write_world(folder, 2, 2, 2, seed=0)),
    "index": ("index.json", LatentShards),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_content_of_another_kind_is_refused_in_one_line(tmp_path, reader, content):
    name, read = READERS[reader]
    if reader in ("metrics", "held out") and content == "empty":
        pytest.skip("an empty log is whole")
    check(read, tmp_path, name, CONTENTS[content])


FIELDS = [
    ("progress", {"epoch": "3"}),
    ("progress", {"epoch": -3}),
    ("progress", {"epoch": 1, "tracker": {"rewards": [["a", ["b"]]]}}),
    ("progress", {"epoch": 1, "plateau": {"previous": math.nan, "quiet_epochs": 0}}),
    ("progress", {"epoch": 1, "held_out": {"best": 3, "last": None, "collapsed": 0, "identity": None}}),
    ("manifest", {"files": []}),
    ("manifest", {"files": {"progress.json": {"bytes": "3", "sha256": "x"}}}),
    ("manifest", {"files": {"progress.json": {"bytes": 3.5, "sha256": "x"}}}),
    ("last config", {"save_freq": "often"}),
    ("metrics", {"epoch": "3"}),
    ("metrics", {"epoch": math.inf}),
    ("held out", {"epoch": [3]}),
    ("image log", [{"path_to_img": 3}]),
    ("image log", [{"path_to_img": "a", "prompt": {}}]),
    ("settings", {"settings": []}),
    ("splits", {"files": {"isic_train.csv": "hash"}}),
    ("conditioning", {"text_encoder_sha256": 1, "files": {}}),
    ("index", {"captions": [1], "images": 1, "shards": []}),
    ("index", {"captions": ["a"], "images": -1, "shards": []}),
    ("index", {"captions": ["a"], "images": 0, "shards": []}),
    ("index", {"captions": ["a"], "images": 10**9, "shards": [{"file": 1, "sha256": "x"}]}),
]


@pytest.mark.parametrize(("reader", "value"), FIELDS)
def test_fields_of_another_kind_are_refused_in_one_line(tmp_path, reader, value):
    name, read = READERS[reader]
    check(read, tmp_path, name, json.dumps(value).encode())


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder, vae = tmp_path_factory.mktemp("latents"), build_vae((8, 8), 16)
    images = [(torch.zeros(3, 16, 16, dtype=torch.uint8), index) for index in range(3)]
    encode_data_set(vae, images, [4, 5, 6], [0, 1, 0], folder, progress=False)
    write_index(folder, vae, ["a", "b"], 3, {})
    assert len(LatentShards(folder)) == 3
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"caption": torch.tensor([0, 1, 2])},
        {"caption": torch.tensor([0, -1, 0])},
        {"caption": torch.tensor([0.0, 1.0, 0.0])},
        {"caption": None},
        {"row": torch.zeros(2, dtype=torch.int64)},
        {"mean": torch.zeros(2, 4, 8, 8).half()},
        {"logvar": torch.zeros(3, 4, 8, 9).half()},
        {"mean": torch.zeros(3).half(), "logvar": torch.zeros(3).half()},
    ],
    ids=lambda change: "-".join(change),
)
def test_latents_that_training_could_not_take_are_refused_at_the_start(latents, tmp_path, change):
    shard = {name: value for name, value in (load_file(latents / "shard_00000.safetensors") | change).items()}
    save_file({name: value for name, value in shard.items() if value is not None}, tmp_path / "shard_00000.safetensors")
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
def classifier(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "h2.safetensors"
    save_classifier(ArtifactClassifier(("hair", "ink"), 32, "tinynet_e"), path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_size", size) for size in (10**9, 10**30, 0, -5, "32", 32.5, None, [32], True, 1e400)),
        *(("labels", labels) for labels in ("hair", 3, None, {"hair": 1}, [], ["hair", 3], ["hair"], ["hair"] * 2)),
        ("labels", [str(number) for number in range(100_000)]),
        *(("arch", arch) for arch in (3, None, ["tinynet_e"], "", "nonsense", "../x", "hf-hub:a/b", "efficientnet_b0")),
        ("arch", "vit_giant_patch14_dinov2"),  # gigabytes, if it were built
        *(("thresholds", given) for given in (3, [0.5], [0.5] * 3, "x", {"hair": "x"}, {"hair": None}, {"ink": 2})),
        *(("thresholds", {"hair": given}) for given in (math.nan, math.inf, -0.1, True, [0.5])),
        ("thresholds", {"other": 0.5}),
    ],
)
def test_classifiers_that_describe_what_cannot_be_are_refused(classifier, tmp_path, field, value):
    path = rewritten(classifier, tmp_path / "x.safetensors", "artifact_classifier", **{field: value})
    with pytest.raises(UserError) as caught:
        load_classifier(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("content", CONTENTS)
def test_descriptions_of_another_kind_are_refused(classifier, tmp_path, content):
    text = CONTENTS[content].decode("latin-1")
    for kind, load in (("artifact_classifier", load_classifier), ("selector", load_selector)):
        save_file(load_file(classifier), tmp_path / "x.safetensors", metadata={kind: text})
        with pytest.raises(UserError, match="x.safetensors") as caught:
            load(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def selector(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "selector.safetensors"
    save_selector(Selector(VisionSizes(16, 8, 16, 1, 2)), path)
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sizes__image_size", size) for size in (10**9, -8, "16", 16.0, None)),
        *(("sizes__width", width) for width in (8192, 10**12, 0, "16")),
        *(("sizes__layers", layers) for layers in (2, 96, 10**9, -1, 1.5)),
        *(("sizes__heads", heads) for heads in (0, 5, "2")),
        *(("sizes__dropout", share) for share in ("0", 1, -1, math.nan)),
        *(("sizes__mlp_ratio", ratio) for ratio in (10**9, -1, 0, "4", math.inf)),
        *(("sizes__stem", stem) for stem in ("other", 3, None)),
        ("sizes__unknown", 3),
        ("sizes", None),
        ("sizes", [16, 8]),
        *(("threshold", given) for given in ("0.5", math.nan, [0.5], True)),
        ("calibration", 3),
        ("origin", "x"),
    ],
)
def test_selectors_that_describe_what_cannot_be_are_refused(selector, tmp_path, field, value):
    path = rewritten(selector, tmp_path / "x.safetensors", "selector", **{field: value})
    with pytest.raises(UserError) as caught:
        load_selector(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "text",
    [
        *('{"r": "4", "lora_alpha": 4}', '{"r": 4, "lora_alpha": "4"}', '{"r": 4, "lora_alpha": NaN}', "[]", "3", "{"),
        *('{"r": -4, "lora_alpha": 4}', '{"r": 1.5, "lora_alpha": 4}', "[" * 10**5, '{"r": 4, "r": 8}', '{"r": [4]}'),
    ],
    ids=lambda text: text[:30],
)
def test_adapter_configurations_of_another_kind_are_refused(tmp_path, text):
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_lora(build_unet((16,), (True,), 16, 8), tmp_path)
    assert "\n" not in str(caught.value)


def test_rounds_are_read_up_to_the_first_that_is_missing(tmp_path):
    script = load_module(ROOT / "scripts" / "improve.py")
    entry = dict.fromkeys(script.Standing.__dataclass_fields__, 0.5)
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps(entry | {"round": number}) + "\n" for number in (0, 1, 3)))
    assert len(script.read_history(path)) == 2
    for bad in ("[" * 10**5, "null", json.dumps(entry | {"round": "0"}), json.dumps(entry | {"round": 0, "kid": None})):
        path.write_text(bad + "\n")
        with pytest.raises(UserError, match="rounds.jsonl"):
            script.read_history(path)
