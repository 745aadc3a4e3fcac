"""Weight files that are something else, torn or not finite: in the reader, and in parts of models.

That every place reads weights by it is tested in test_security.py.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_unet import make_unet
from torch import nn

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.generator.from_scratch import load_vae
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.generator.pipeline import load_pipeline, replace_unet_weights
from ddpo_pytorch.generator.text import load_text_encoder
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, new_classifier, save_classifier
from ddpo_pytorch.judges.selector import Selector, load_selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.weights import read_pickle, read_tensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438167534\n"
CONTENTS = {  # and a word of its error
    "page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "page with a byte order mark": (b"\xef\xbb\xbf\r\n<html>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "text": (b"Entry not found", "text"),
    "long text": ("größer ".encode() * 400, "text"),
    "pointer": (LFS, "git lfs pull"),
    "empty": (b"", "empty"),
}


def refused(path, word: str = ""):
    """One line that names the file and a word, without PyTorch's advice to unpickle."""
    return pytest.raises(UserError, match=rf"(?s)^(?!.*(\n|weights_only)).*{re.escape(str(path))}.*{re.escape(word)}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", CONTENTS)
def test_other_files_are_recognised(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    data, word = CONTENTS[content]
    path.write_bytes(data)
    with refused(path, word):
        read_tensors(path)


@pytest.mark.parametrize("kept", [5, 40, 300, -1])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torn_files_are_named(tmp_path, suffix, kept):
    path, state = tmp_path / f"weights{suffix}", {"layer.weight": torch.rand(9, 9)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused(path):
        read_tensors(path)


def test_the_content_decides_the_format(tmp_path):
    state = {"layer.weight": torch.rand(3, 2)}
    save_file(state, tmp_path / "renamed.bin", metadata={"format": "pt"})
    tensors, metadata = read_tensors(tmp_path / "renamed.bin")
    assert torch.equal(tensors["layer.weight"], state["layer.weight"]) and metadata == {"format": "pt"}
    for name, wrapped in (("a.pth", state), ("b.pth", {"epoch": 3, "model_state_dict": state})):
        torch.save(wrapped, tmp_path / name)
        assert torch.equal(read_tensors(tmp_path / name)[0]["layer.weight"], state["layer.weight"])
    torch.save(state, tmp_path / "pickle.safetensors")
    with pytest.raises(UserError, match=r"pickle\.safetensors"):
        read_tensors(tmp_path / "pickle.safetensors")


def test_a_pickle_of_more_than_tensors_names_what_it_holds(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear"):
        read_pickle(tmp_path / "module.pth")


PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
OPENERS = {"vae": lambda folder: load_vae(folder / "vae"), "text_encoder": load_text_encoder}


@pytest.fixture
def copy(tiny_pipeline_dir, tmp_path):
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_model_folder_say_what_they_are(copy, part, suffix):
    (copy / part / f"{PARTS[part]}.safetensors").unlink()
    stem = "pytorch_model" if (part, suffix) == ("text_encoder", ".bin") else PARTS[part]
    path = copy / part / f"{stem}{suffix}"
    for data, word in (CONTENTS["page"], CONTENTS["pointer"]):
        path.write_bytes(data)
        for read in (load_pipeline, OPENERS.get(part, load_pipeline)):
            with refused(path, word):
                read(copy)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_finite_is_named_by_tensor_and_file(copy, part):
    path = copy / part / f"{PARTS[part]}.safetensors"
    weights = load_file(path)
    name = sorted(weights)[2]
    weights[name].view(-1)[0] = -torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    for read in (load_pipeline, OPENERS.get(part, load_pipeline)):
        with refused(path, name):
            read(copy)


def test_weights_that_overflow_in_half_precision_are_named(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] = 1e5  # the largest half is 65504
    save_file(weights, path, metadata={"format": "pt"})
    load_pipeline(copy)
    with refused(copy, "conv_in.bias holds NaN or infinity as float16"):
        load_pipeline(copy, dtype=torch.float16)


def test_single_files_that_are_not_finite_are_named(tmp_path):
    unet, classifier, selector = (
        make_unet(),
        ArtifactClassifier(LABELS, 32, "tinynet_e"),
        Selector(VisionSizes(16, 8, 16, 1, 2)),
    )
    for module in (classifier, selector):
        module.head_name = next(iter(module.state_dict()))
        module.state_dict()[module.head_name].fill_(torch.nan)
    save_classifier(classifier, tmp_path / "h6.safetensors")
    save_selector(selector, tmp_path / "selector.safetensors")
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    state["conv_out.bias"][0] = torch.inf
    save_file(state, tmp_path / "unet.safetensors")
    adapter = {"unet.down_blocks.0.lora_A.weight": torch.full((4, 8), torch.nan)}
    save_file(adapter, tmp_path / "lora.safetensors")
    torch.save(adapter, tmp_path / "lora.bin")
    for name, tensor, read in (
        ("h6.safetensors", classifier.head_name, load_classifier),
        ("h6.safetensors", classifier.head_name, lambda path: new_classifier(LABELS, 32, "tinynet_e", str(path))),
        ("selector.safetensors", selector.head_name, load_selector),
        ("unet.safetensors", "conv_out.bias", lambda path: replace_unet_weights(unet, path)),
        ("lora.safetensors", "down_blocks.0", lambda path: load_lora(unet, path)),
        ("lora.bin", "down_blocks.0", lambda path: load_lora(unet, path)),
    ):
        with refused(tmp_path / name, tensor):
            read(tmp_path / name)
