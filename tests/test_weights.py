"""Weight files that are something else, torn or not finite; test_security.py tests that every place refuses them."""

import re

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.utils.weights import read_pickle, read_tensors

CONTENTS = {  # and a word of its error
    "page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "page with a byte order mark": (b"\xef\xbb\xbf\r\n<html>", "web page"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343\n", "git lfs pull"),
    "empty": (b"", "empty"),
}


def assert_refused(path, word: str = "", read=read_tensors) -> None:
    """The error names the file and a word, without PyTorch's advice to unpickle."""
    refused(rf"^(?!.*weights_only).*{re.escape(str(path))}.*{re.escape(word)}", read, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_and_torn_files_are_recognised(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for data, word in CONTENTS.values():
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


def test_the_content_decides_the_format(tmp_path):
    state = {"layer.weight": torch.rand(3, 2)}
    save_file(state, tmp_path / "renamed.bin", metadata={"format": "pt"})
    tensors, metadata = read_tensors(tmp_path / "renamed.bin")
    assert torch.equal(tensors["layer.weight"], state["layer.weight"]) and metadata == {"format": "pt"}
    for name, wrapped in (("a.pth", state), ("b.pth", {"epoch": 3, "model_state_dict": state})):
        torch.save(wrapped, tmp_path / name)
        assert torch.equal(read_tensors(tmp_path / name)[0]["layer.weight"], state["layer.weight"])
    torch.save(state, tmp_path / "pickle.safetensors")
    assert_refused(tmp_path / "pickle.safetensors")


def test_a_pickle_of_more_than_tensors_names_what_it_holds(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    assert_refused(tmp_path / "module.pth", "torch.nn.modules.linear.Linear", read_pickle)
