"""The best checkpoint of a run, which is replaced whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddpo_pytorch.training import checkpoints as saving
from ddpo_pytorch.training.checkpoints import (
    checkpoints,
    epochs_completed,
    find_checkpoint,
    find_weights,
    recover_best,
    save_best,
    snapshot,
)
from ddpo_pytorch.utils.errors import UserError


def save(folder, value: float):
    unet = nn.Linear(1, 1)
    nn.init.constant_(unet.weight, value)
    return save_best(folder, snapshot(unet, torch.optim.AdamW(unet.parameters()), None), {"epoch": int(value)})


def held(folder) -> tuple[int, float]:
    """Epoch and weight of a checkpoint."""
    return epochs_completed(folder), load_file(folder / "unet.safetensors")["weight"].item()


def test_best_is_replaced_and_leaves_nothing_else(tmp_path):
    assert held(save(tmp_path, 1.0)) == (1, 1.0)
    assert held(save(tmp_path, 2.0)) == (2, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["best"] and checkpoints(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_kill_at_any_rename_leaves_a_whole_best(tmp_path, monkeypatch, failing):
    """The renames: the new one gets complete, the old one steps aside, the new one takes its place."""
    save(tmp_path, 1.0)
    calls, replace = [], saving.os.replace

    def killed(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2.0)
    assert len(calls) == failing
    expected = (2, 2.0) if failing == 3 else (1, 1.0)
    assert held(recover_best(tmp_path)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert held(save(tmp_path, 3.0)) == (3, 3.0)


def test_no_best(tmp_path):
    assert recover_best(tmp_path) is None and recover_best(tmp_path / "nowhere") is None


def test_epochs_come_from_name_or_progress(tmp_path):
    assert epochs_completed(tmp_path / "checkpoint_12") == 12
    (tmp_path / "progress.json").write_text(json.dumps({"epoch": 7}))
    assert epochs_completed(tmp_path) == 7
    (tmp_path / "progress.json").write_text('{"ep')
    with pytest.raises(UserError, match="progress.json' is damaged"):
        epochs_completed(tmp_path)


def test_a_run_that_only_has_a_best_is_found(tmp_path):
    save(tmp_path, 1.0)
    assert not checkpoints(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / "best" and find_weights(tmp_path).parent == tmp_path / "best"
