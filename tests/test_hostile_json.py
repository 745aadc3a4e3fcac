"""Each file of JSON that a command reads, with content of every wrong kind: one line that names the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from refusals import refused
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


def fault(path: Path, read, *arguments) -> str:
    """Assert that reading ends with one line that names the file; return it."""
    message = refused([path.name], read, *arguments)
    assert len(message) < 1600
    return message


def no_damage(folder: Path) -> None:
    if reason := find_damage(folder):
        raise UserError(reason)


def runs(folder: Path):
    for name in ("metrics.jsonl", "held_out.jsonl"):
        path = folder / name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b'\n{"epoch": 0}\n')
    read_runs({"run": folder})


READERS = {
    "progress": ("progress.json", epochs_completed),
    "manifest": ("manifest.json", no_damage),
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
    ("image log", [{"path_to_img": "a", "seed": 1}, {"path_to_img": "/old/images/b/a"}, {"path_to_img": "a"}]),
    ("settings", {"settings": []}),
    ("splits", {"files": {"isic_train.csv": "hash"}}),
    ("conditioning", {"text_encoder_sha256": 1, "files": {}}),
    ("index", {"captions": [1], "images": 1, "shards": []}),
    ("index", {"captions": ["a"], "images": 0, "shards": []}),
    ("index", {"captions": ["a"], "images": 10**9, "shards": [{"file": 1, "sha256": "x"}]}),
]


@pytest.mark.parametrize("reader", READERS)
def test_another_content_or_field_is_refused(tmp_path, reader):
    name, read = READERS[reader]
    assert {one for one, _ in FIELDS} <= READERS.keys()  # or a case would be left out
    fields = [json.dumps(value).encode() for one, value in FIELDS if one == reader]
    for number, content in enumerate([*CONTENTS.values(), *fields]):
        if content or not name.endswith(".jsonl"):  # an empty log is whole
            (folder := tmp_path / str(number)).mkdir()
            (folder / name).write_bytes(content)
            fault(folder / name, read, folder)


def test_latents_that_training_could_not_take_are_refused_at_the_start(tmp_path):
    (latents := tmp_path / "latents").mkdir()
    vae, captions = build_vae((8, 8), 16), ["a", "b"]
    pictures = [(torch.zeros(3, 16, 16, dtype=torch.uint8), index) for index in range(3)]
    encode_data_set(vae, pictures, [4, 5, 6], [0, 1, 0], latents, progress=False)
    write_index(latents, vae, captions, 3, {})
    assert len(LatentShards(latents)) == 3
    for change in (
        *({"caption": value} for value in (torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 0.0]), None)),
        {"row": torch.zeros(2, dtype=torch.int64)},
        {"mean": torch.zeros(2, 4, 8, 8).half()},
        {"mean": torch.zeros(3).half(), "logvar": torch.zeros(3).half()},
    ):
        shard = load_file(latents / "shard_00000.safetensors") | change
        shard = {name: value for name, value in shard.items() if value is not None}
        save_file(shard, tmp_path / "shard_00000.safetensors")
        write_index(tmp_path, vae, captions, 3, {})
        refused("index.json", LatentShards, tmp_path)


JUDGES = {
    "artifact_classifier": (load_classifier, save_classifier, ArtifactClassifier, (("hair", "ink"), 32, "tinynet_e")),
    "selector": (load_selector, save_selector, Selector, (VisionSizes(16, 8, 16, 1, 2),)),
}
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


@pytest.mark.parametrize("kind", JUDGES)
def test_judges_with_impossible_descriptions_and_those_of_another_kind_are_refused(tmp_path, kind):
    load, save, judge, arguments = JUDGES[kind]
    save(judge(*arguments), path := tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[kind])
    weights = load_file(path)
    texts = [CONTENTS[content].decode("latin-1") for content in ("torn", "list of numbers", "deep")]
    for name, value in ((name, value) for name, values in IMPOSSIBLE[kind].items() for value in values):
        field, _, inner = name.partition("__")
        texts.append(json.dumps(description | {field: description[field] | {inner: value} if inner else value}))
    for text in texts:
        save_file(weights, path, metadata={kind: text})
        fault(path, load, path)


def test_adapter_configurations_of_another_kind_are_refused(tmp_path):
    unet = build_unet((16,), (True,), 16, 8)
    name, layer = next((name, module) for name, module in unet.named_modules() if name.endswith("to_q"))
    pair = {"A": torch.zeros(4, layer.in_features), "B": torch.zeros(layer.out_features, 4)}
    adapter = {f"{name}.lora_{part}.weight": value for part, value in pair.items()}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    for text in ('{"r": "4", "lora_alpha": 4}', '{"r": 4, "lora_alpha": NaN}', '{"r": -4}', "[]", "{torn"):
        (tmp_path / "adapter_config.json").write_text(text)
        fault(tmp_path / "adapter_config.json", load_lora, unet, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(CONTENTS["bytes"])
    fault(tmp_path / "adapter_config.json", load_lora, unet, tmp_path)
    save_file({name: value + 1 for name, value in adapter.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 1e300}')  # finite, its products are not
    fault(tmp_path / "adapter_model.safetensors", load_lora, unet, tmp_path)
    assert not any("lora" in name for name, _ in unet.named_parameters())


def test_rounds_are_read_up_to_the_first_that_is_missing(tmp_path):
    path = tmp_path / "rounds.jsonl"
    entry = dict.fromkeys(RoundMetrics.__dataclass_fields__, 0.5) | {"guards": {"vessels": [0.1, 0.02]}}
    path.write_text("".join(json.dumps(entry | {"round": number}) + "\n" for number in (0, 1, 3)))
    assert len(read_history(path)) == 2
    for bad in ({"round": "0"}, {"round": 0, "kid": None}, {"round": 0, "guards": {"vessels": [0.1]}}, None):
        path.write_text((json.dumps(entry | bad) if bad else "[" * 10**5) + "\n")
        fault(path, read_history, path)


SHAPE = {
    "epoch": COUNT,
    "tracker?": {"rewards": [(OneOf((str, int)), [float])]},
    "best?": OneOf(({"apr": float}, None)),
}
SHAPE |= {"scores?": {str: float}, "done?": bool}
GOOD = [
    {"epoch": 0},
    {"epoch": 3, "other": {"any": [None, 1e5]}, "best": None, "done": True},
    {"epoch": 3, "best": {"apr": 1}, "scores": {"a": 0.5, "b?": 2}, "tracker": {"rewards": [["ä", [1, 0.5]], [3, []]]}},
]
BAD = [
    (b"\xff\xfe\x00", "JSON"),
    ('{"epochs": 3}', "'epoch' is missing"),
    ('{"epoch": true}', "'epoch' is True"),
    ('{"epoch": 1, "x": %s}' % ("9" * 10_000), "64 bits"),
    ("[" * 10**6, "nested"),
    ('{"epoch": 1, "x": ' + '{"x": ' * 100 + "1" + "}" * 101, "nested"),
    ('{"epoch": 1, "x": [{"y": 1, "y": 1}]}', "'y' appears twice"),
    ('{"epoch": 1, "x": "\\ud800"}', "Unicode"),
    ('{"epoch": 1, "best": {"apr": NaN}}', "'best'"),
    ('{"epoch": 1, "scores": {"a?": 1e999}}', "'scores'.'a?' is inf"),
    ('{"epoch": 1, "tracker": {"rewards": {}}}', "'tracker'.'rewards' is {}"),
    ('{"epoch": 1, "tracker": {"rewards": [["a"]]}}', "'tracker'.'rewards'[0]"),
    ('{"epoch": 1, "tracker": {"rewards": [["a", [1]], ["b", [1, null]]]}}', "[1][1][1] is None"),
]


def test_a_value_that_fits_is_returned_and_one_that_does_not_is_named(tmp_path):
    path = tmp_path / "progress.json"
    for value in GOOD:
        path.write_text(json.dumps(value))
        assert read_json(path, SHAPE) == value
    assert parse_json(str(2**64 - 1), int, "x") == 2**64 - 1  # a seed
    for text, said in BAD:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        message = refused([said], read_json, path, SHAPE, "do this")
        assert message.startswith(f"{str(path)!r} ") and message.endswith("; do this")
        assert len(message) < 500 + len(str(path))
