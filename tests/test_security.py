"""Files from elsewhere run no code wherever weights or caches are read, and are named if they are something else."""

import ast
import json
import pickle
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.data.images import DecodedImages, ImageFiles
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.generator.from_scratch import load_vae
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.generator.pipeline import load_pipeline, replace_unet_weights
from ddpo_pytorch.generator.text import load_text_encoder
from ddpo_pytorch.judges import classifier
from ddpo_pytorch.judges.policy import load_policy_judge
from ddpo_pytorch.judges.selector import load_selector
from ddpo_pytorch.metrics import networks
from ddpo_pytorch.metrics.feature_store import Rows
from ddpo_pytorch.training.checkpoints import PROGRESS_FILE, STATE_FILE, UNET_FILE, load_checkpoint
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.training_state import TrainState
from ddpo_pytorch.utils.weights import read_pickle, read_tensors


class Touch(str):
    """A path where this makes a file when it is unpickled in full."""

    def __reduce__(self):
        return open, (str(self), "w")


FORMS = {
    "torch": lambda payload, path: torch.save({"model_state_dict": payload}, path),
    "pickle": lambda payload, path: path.write_bytes(pickle.dumps(payload)),
    "numpy": lambda payload, path: np.save(open(path, "wb"), np.array([payload], dtype=object), allow_pickle=True),
}
IN_FULL = {"torch": partial(torch.load, weights_only=False), "pickle": pickle.load}
IN_FULL["numpy"] = partial(np.load, allow_pickle=True)


def _checkpoint(path: Path) -> None:
    """A checkpoint whose optimizer state is this file."""
    unet = nn.Linear(1, 1)
    save_file(unet.state_dict(), path.with_name(UNET_FILE))
    path.with_name(PROGRESS_FILE).write_text("{}")
    load_checkpoint(path.parent, unet, torch.optim.AdamW(unet.parameters()), None)


def _latents(path: Path) -> None:
    index = {"captions": [], "images": 0, "shards": [{"file": path.name, "sha256": sha256(path)}]}
    path.with_name(INDEX).write_text(json.dumps(index))
    LatentShards(path.parent)


new_classifier = partial(classifier.new_classifier, LABELS, 32)
# the file's name, and what reads it in the project
PLACES = {
    "classifier": ("classifier.pth", classifier.load_classifier),
    "own classifier": ("classifier.safetensors", classifier.load_classifier),
    "backbone": ("backbone.pth", lambda path: classifier.load_backbone(new_classifier("tinynet_e", "none"), path)),
    # a file that torchvision would take from PyTorch's cache
    "ImageNet weights": (classifier.TORCHVISION_FILE, lambda _: new_classifier(classifier.PUBLISHED_ARCH, "imagenet")),
    "LoRA, as published": ("pytorch_lora_weights.bin", lambda path: load_lora(nn.Linear(1, 1), path.parent)),
    "LoRA of peft": ("adapter_model.bin", lambda path: load_lora(nn.Linear(1, 1), path.parent)),
    "LoRA": ("pytorch_lora_weights.safetensors", lambda path: load_lora(nn.Linear(1, 1), path)),
    "optimizer": (STATE_FILE, _checkpoint),
    "training state": ("state.pt", lambda path: TrainState(path, {}).load()),
    "Inception": ("inception.pth", lambda path: networks.inception_network(str(path))),
    "AlexNet": ("alexnet.pth", lambda path: networks.lpips_network(str(path))),
    "DINOv2": ("dinov2.pth", lambda path: networks.encoder_network("dinov2_vits14", str(path))),
    "UNet": ("unet.safetensors", lambda path: replace_unet_weights(nn.Linear(1, 1), path)),
    "Selector": ("selector.safetensors", load_selector),
    "Policy": ("policy.safetensors", load_policy_judge),
    "latents": ("shard_00000.safetensors", _latents),
    "metric cache": ("rows.npy", lambda path: Rows([path], 1, 1)[:]),
    "image cache": ("images.npy", lambda path: DecodedImages(ImageFiles([path], torch.zeros(1, 1), 8), path)[0]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_no_file_is_unpickled_in_full(tmp_path, monkeypatch, place, form):
    name, read = PLACES[place]
    folder = tmp_path / "hub" / "checkpoints"  # PyTorch's cache
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    FORMS[form](Touch(touched := tmp_path / "touched"), folder / name)
    refused(place if place == "ImageNet weights" else name, read, folder / name)  # no user named that file
    assert not touched.exists()
    with open(folder / name, "rb") as file:
        IN_FULL[form](file)
    assert touched.is_file()  # or nothing here could fail


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize(
    ("part", "name", "read"),
    [
        ("unet", "diffusion_pytorch_model", load_pipeline),
        ("vae", "diffusion_pytorch_model", lambda folder: load_vae(folder / "vae")),
        ("text_encoder", "model", load_text_encoder),
    ],
)
def test_no_part_of_a_model_folder_is_unpickled_in_full(own_model, tmp_path, form, part, name, read):
    """diffusers and transformers take a .bin where there are no safetensors."""
    (own_model / part / f"{name}.safetensors").unlink()
    file = own_model / part / f"{name.removeprefix('model') or 'pytorch_model'}.bin"
    FORMS[form](Touch(tmp_path / "touched"), file)
    refused(str(own_model), read, own_model)
    assert not (tmp_path / "touched").exists()


AUTO = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
CODE = {  # a part, its file, and the fields that change there
    "component": (".", "model_index.json", {"unet": ["evil", "Evil"]}),
    "pipeline": (".", "model_index.json", {"_class_name": ["evil", "Evil"]}),
    "installed module": (".", "model_index.json", {"unet": ["antigravity", "fly"]}),
    "text encoder": ("text_encoder", "config.json", {"model_type": "evil", "auto_map": AUTO}),
    "tokenizer": ("tokenizer", "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": AUTO}),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_model_folder_is_not_run(own_model, tmp_path, monkeypatch, kind):
    """Nor is anybody asked whether it should be: whoever says yes without reading would run it."""
    where, name, fields = CODE[kind]
    file = own_model / where / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    for folder in {own_model, file.parent}:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nEvil = object\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for read in (load_pipeline, load_text_encoder):
        try:
            read(own_model)
        except UserError as error:
            assert str(own_model) in str(error) and "\n" not in str(error)
        assert not (tmp_path / "touched").exists() and "antigravity" not in sys.modules


RUNS_CODE = {"eval", "exec", "os.system", "os.popen", "torch.jit.load", "torch.hub.load", "pd.read_pickle", "np.load"}
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def _faults(node: ast.AST) -> bool:
    """Return whether a piece of source runs, or may run, its input."""
    if isinstance(node, ast.Import):
        return bool(UNPICKLERS & {alias.name.split(".")[0] for alias in node.names})
    if isinstance(node, ast.ImportFrom):
        return node.module in UNPICKLERS and [alias.name for alias in node.names] != [pickle.UnpicklingError.__name__]
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    given = {one.arg: isinstance(one.value, ast.Constant) and one.value.value for one in node.keywords}
    if name.endswith(("torch.load", "load_state_dict_from_url", "get_state_dict")):
        return given.get("weights_only") is not True
    dangerous = any(given.get(option) for option in ("allow_pickle", "trust_remote_code", "shell"))
    return name in RUNS_CODE or dangerous or (name.startswith("wandb.") and name != "wandb.init")


def test_no_code_of_the_project_unpickles_or_evaluates():
    """Nor does it hand images to Weights & Biases: of that, wandb.init and a run's log and finish are all there is."""
    folders = "ddpo_pytorch", "scripts", "config", "benchmarks"
    for path in (path for name in folders for path in (ROOT / name).rglob("*.py")):
        assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if _faults(node)], path
    for text in ("torch.load(f)", "import pickle", "eval(x)", "f(shell=True)", "wandb.Image(x)", "np.load(f)"):
        assert any(_faults(node) for node in ast.walk(ast.parse(text))), text


def assert_refused(path, word: str = "", read=read_tensors) -> None:
    """The error names the file and a word, without PyTorch's advice to unpickle."""
    refused(rf"^(?!.*weights_only).*{re.escape(str(path))}.*{re.escape(word)}", read, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_and_torn_files_are_recognised(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for data, word in (
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\xef\xbb\xbf\r\n<html>", "web page"),  # with a byte order mark
        (b'{"error": "Repository not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343\n", "git lfs pull"),
        (b"", "empty"),
    ):
        path.write_bytes(data)
        assert_refused(path, word)
    save, state = save_file if suffix == ".safetensors" else torch.save, {"layer.weight": torch.rand(9, 9)}
    for kept in (5, 40, 300, -1):
        save(state, path)
        path.write_bytes(path.read_bytes()[:kept])
        assert_refused(path)
    state["layer.weight"][3, 3] = torch.nan
    save(state, path)
    assert_refused(path, "layer.weight")


def test_the_content_decides_the_format_and_a_pickle_of_more_than_tensors_is_named(tmp_path):
    state = {"layer.weight": torch.rand(3, 2)}
    save_file(state, tmp_path / "renamed.bin", metadata={"format": "pt"})
    tensors, metadata = read_tensors(tmp_path / "renamed.bin")
    assert torch.equal(tensors["layer.weight"], state["layer.weight"]) and metadata == {"format": "pt"}
    for name, wrapped in (("a.pth", state), ("b.pth", {"epoch": 3, "model_state_dict": state})):
        torch.save(wrapped, tmp_path / name)
        assert torch.equal(read_tensors(tmp_path / name)[0]["layer.weight"], state["layer.weight"])
    torch.save(state, tmp_path / "pickle.safetensors")
    assert_refused(tmp_path / "pickle.safetensors")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    assert_refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear", read_pickle)
