"""The classifier's training: resuming, the best epoch, options, mixed precision, several processes."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import LABELS, load_split
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_training import Recipe, fit, predict
from ddpo_pytorch.utils import training_state
from ddpo_pytorch.utils.errors import UserError

HEADS = LABELS[:4]
STATES = (AcceleratorState, GradientState, PartialState)  # of a process; each accelerator shares them


@pytest.fixture
def accelerators():
    """Function (mixed precision): an accelerator on the CPU."""

    def make(mixed_precision="no"):
        for state in STATES:
            state._reset_state()
        return Accelerator(cpu=True, mixed_precision=mixed_precision)

    yield make
    for state in STATES:
        state._reset_state()


@pytest.fixture(scope="module")
def sets(world):
    def files(split):
        rows, paths, _ = load_split(world / "splits" / f"phantom_{split}.csv", world / "images")
        return ImageFiles(paths, torch.tensor([row.labels[:4] for row in rows], dtype=torch.float32), 32)

    return {split: files(split) for split in ("train", "val")}


def new_model(seed=0):
    torch.manual_seed(seed)
    return ArtifactClassifier(HEADS, 32, "tinynet_e")


class Stopped(Exception):
    pass


def stop_after(monkeypatch, epochs):
    """Let training end like a killed one once it has written its state that often. 0: never."""
    seen, save = [], training_state.save_state

    def counted(path, state, belongs_to):
        save(path, state, belongs_to)
        seen.append(state["parts"]["optimizer"]["param_groups"][0]["lr"])
        if len(seen) == epochs:
            raise Stopped

    monkeypatch.setattr(training_state, "save_state", counted)
    return seen


RECIPE = Recipe(num_epochs=4, batch_size=16, learning_rate=2e-3, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("additions", [{}, {"ema_decay": 0.9, "quarter_turns": True}])
def test_a_stopped_training_ends_like_one_that_was_not(additions, accelerators, sets, tmp_path, monkeypatch, caplog):
    def run(model, stop=0, workers=0):
        calls = []
        recipe = Recipe(**RECIPE.__dict__ | {"num_workers": workers} | additions)
        with monkeypatch.context() as patch:
            rates = stop_after(patch, stop)
            try:
                result = fit(accelerators(), model, sets["train"], sets["val"], recipe,
                             state_path=tmp_path / "state.pt", on_best=calls.append, epoch_images=31)  # fmt: skip
            except Stopped:
                result = None
        return result, calls, rates

    whole, before = new_model(), torch.random.get_rng_state()
    expected, better, rates = run(whole)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are its own
    curve = [1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(1, 5)]
    assert rates == pytest.approx(curve, rel=1e-6)
    assert expected.epochs == 4 and expected.best_epoch == better[-1].epoch and not (tmp_path / "state.pt").exists()

    run(new_model(), stop=2)
    assert (tmp_path / "state.pt").exists()
    caplog.set_level("INFO")
    resumed = new_model()
    result, again, _ = run(resumed, workers=1)
    assert result == expected and "2 of 4 epochs are done" in caplog.text
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    # the best epoch is handed out again, for what is made from it may have been lost.
    assert again[0].epoch == max(best.epoch for best in better if best.epoch < 2)
    assert torch.equal(again[-1].logits, better[-1].logits) and again[-1].val_loss == better[-1].val_loss
    assert not (tmp_path / "state.pt").exists()


def test_the_best_epoch_is_kept_and_patience_ends_the_training(accelerators, sets, caplog):
    caplog.set_level("INFO")
    val = ImageFiles(sets["val"].paths, 1 - sets["val"].targets, 32)  # the better the training, the worse
    recipe = Recipe(num_epochs=9, patience=2, batch_size=16, learning_rate=5e-3)
    model, calls, accelerator = new_model(), [], accelerators()
    result = fit(accelerator, model, sets["train"], val, recipe, on_best=calls.append)
    assert result.epochs == result.best_epoch + 3 < 9 and "for 2 epochs, stopping" in caplog.text
    logits, labels = predict(accelerator, model, val, 16)
    assert torch.equal(logits, calls[-1].logits) and torch.equal(labels, val.targets)
    assert result.best_loss == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item(), rel=1e-6)
    assert calls[-1].accuracy.tolist() == ((logits > 0) == (labels > 0)).float().mean(0).tolist()
    line = next(record.message for record in caplog.records if record.message.startswith("epoch 0: loss"))
    assert all(f" {name} 0." in line or f" {name} 1." in line for name in HEADS) and "images/s" in line


def test_states_that_do_not_belong_to_the_training(accelerators, sets, tmp_path, monkeypatch):
    path = tmp_path / "state.pt"

    def begin(seed=0, train=sets["train"], recipe=RECIPE, precision="no"):
        fit(accelerators(precision), new_model(seed), train, sets["val"], recipe, state_path=path)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 1)
        begin()
    kept = path.read_bytes()
    flipped = ImageFiles(sets["train"].paths, 1 - sets["train"].targets, 32)
    for changed, message in (
        ({"recipe": Recipe(**RECIPE.__dict__ | {"learning_rate": 1e-3})}, "learning_rate=0.002, now it is 0.001"),
        ({"recipe": Recipe(**RECIPE.__dict__ | {"focal_gamma": 1.0})}, "focal_gamma=0.0, now it is 1.0"),
        ({"train": flipped}, "training images="),
        ({"seed": 1}, "initial weights="),
        ({"precision": "bf16"}, "mixed_precision='no', now it is 'bf16'"),
    ):
        with pytest.raises(UserError, match=message):
            begin(**changed)
        assert path.read_bytes() == kept
    path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UserError, match="is damaged") as caught:
        begin()
    assert "state.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_training_that_diverges_leaves_nothing(accelerators, sets, tmp_path):
    recipe = Recipe(num_epochs=2, batch_size=16, learning_rate=1e30)
    with pytest.raises(UserError, match="never finite"):
        fit(accelerators(), new_model(), sets["train"], sets["val"], recipe, state_path=tmp_path / "state.pt")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_bf16_trains_float32_weights_and_leaves_the_model_as_it_was(accelerators, sets):
    calls, runs = [], []
    for precision in ("no", "bf16"):
        model = new_model()
        recipe = Recipe(num_epochs=1, batch_size=16, learning_rate=2e-3)
        fit(accelerators(precision), model, sets["train"], sets["val"], recipe, on_best=calls.append)
        runs.append(model)
    exact, rough = (call.logits for call in calls)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    # Both move the same way: cosine .82 to .84 on several instruction sets, 0 for unrelated trainings. Logits are no
    # measure: after one epoch they are near 0 for every image.
    start = new_model().state_dict()
    moved = [torch.cat([(value - start[name]).flatten() for name, value in model.named_parameters()]) for model in runs]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.5
    assert all(value.dtype in (torch.float32, torch.int64) for value in runs[1].state_dict().values())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = ArtifactClassifier.forward(runs[1], pixels)
        assert torch.equal(runs[1](pixels), plain)  # without autocast
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(runs[1](pixels).float(), plain)


def test_predictions_are_those_of_the_model_in_order(accelerators, sets):
    model, files = new_model().eval(), sets["train"]
    model.model.classifier.weight.data *= 1e3
    files = ImageFiles(files.paths[:21], files.targets[:21], 32)
    logits, labels = predict(accelerators(), model, files, 8, num_workers=1)
    images = torch.stack([files[index][0] for index in range(21)]).float() / 255
    assert torch.allclose(logits, model.logits(images), atol=1e-6) and logits.std() > 1e-3
    assert torch.equal(labels, files.targets) and logits.dtype == labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_epochs", 0), ("patience", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan),
     ("ema_decay", 1.0), ("ema_decay", -0.1), ("focal_gamma", -1.0), ("focal_gamma", math.inf),
     ("seed", -1), ("num_workers", -1)],
)  # fmt: skip
def test_recipes_that_cannot_work(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        Recipe(**{field: value})


def test_official_values_are_the_defaults():
    off = {"pos_weight": False, "focal_gamma": 0.0, "quarter_turns": False, "ema_decay": 0.0}
    assert Recipe() == Recipe(20, 15, 32, 1e-4, **off, seed=42, num_workers=0)


def test_too_few_images(accelerators, sets):
    with pytest.raises(UserError, match="too few"):
        fit(accelerators(), new_model(), sets["train"], sets["val"], RECIPE, epoch_images=0)


PROGRAM = """
import shutil, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges import classifier_training as training
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_training import predict
from ddpo_pytorch.utils import training_state

folder = Path(sys.argv[1])
sets = {
    split: ImageFiles(paths, labels, 32)
    for split, (paths, labels) in torch.load(folder / "sets.pt", weights_only=True).items()
}
accelerator, state, kept = Accelerator(cpu=True), folder / "state.pt", folder / "kept.pt"
save = training_state.save_state

def keep_the_first(*arguments):
    save(*arguments)
    if not kept.exists():
        shutil.copy(state, kept)

training_state.save_state = keep_the_first
runs = []
for run in range(2):
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e")
    model.model.classifier.weight.data *= 1e3
    first, labels = predict(accelerator, model, sets["val"], 4)
    if run and accelerator.is_main_process:
        shutil.copy(kept, state)
    accelerator.wait_for_everyone()
    recipe = training.Recipe(num_epochs=2, batch_size=8, learning_rate=2e-3, ema_decay=0.9)
    result = training.fit(accelerator, model, sets["train"], sets["val"], recipe, state_path=state)
    runs.append({"weights": model.state_dict(), "result": vars(result)})
torch.save({"first": first, "labels": labels, "runs": runs}, folder / f"rank{accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_agree_and_resume(accelerators, sets, tmp_path):
    """21 training and 13 validation images: neither divides."""
    uneven = {
        split: ImageFiles(files.paths[:count], files.targets[:count], 32)
        for (split, files), count in zip(sets.items(), (21, 13), strict=True)
    }
    content = {split: (list(map(str, files.paths)), files.targets) for split, files in uneven.items()}
    torch.save(content, tmp_path / "sets.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [*launcher, tmp_path / "program.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    runs = [run for rank in ranks for run in rank["runs"]]
    assert all(run["result"] == runs[0]["result"] for run in runs) and runs[0]["result"]["epochs"] == 2
    for name, value in runs[0]["weights"].items():
        assert all(torch.equal(run["weights"][name], value) for run in runs), name
    assert not (tmp_path / "state.pt").exists() and (tmp_path / "kept.pt").exists()

    model = new_model()
    model.model.classifier.weight.data *= 1e3
    logits, labels = predict(accelerators(), model, uneven["val"], 4)
    for rank in ranks:
        assert torch.allclose(rank["first"], logits, atol=1e-6) and torch.equal(rank["labels"], labels)
