"""train_sd.py stopped and resumed, and with two processes: the same end."""

import shutil

import pytest
from safetensors.torch import load_file
from script_tools import assert_same_training, options, succeed
from stage_tools import EXACT, assert_equal, entries, unet_of

from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.training import Training

pytest_plugins = ["script_tools", "stage_tools"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet", "finetune"])
def test_a_training_that_was_stopped_goes_on_to_the_same_end(stage, model, train, tmp_path, monkeypatch):
    fields = {"sd__stage": stage, "sd__num_steps": 5, "sd__save_every": 2, "sd__gradient_accumulation_steps": 2}
    fields["pretrained__model"] = str(model[0])
    for name in ("whole", "stopped"):
        if stage == "unet":
            shutil.copytree(model[0] / "vae", tmp_path / name / "vae")
    expected = train(tmp_path / "whole", **fields)

    snapshot = Training.snapshot

    def stop(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return snapshot(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "snapshot", stop)
        train(tmp_path / "stopped", **fields)
    assert len(entries(tmp_path / "stopped" / f"{stage}.jsonl")) > 4  # steps 3 and 4 will be repeated
    with pytest.raises(
        UserError, match="unfinished training with sd.learning_rate=0.001, now it is 0.1; give the same"
    ):
        train(tmp_path / "stopped", **fields, sd__learning_rate=0.1)
    log = train(tmp_path / "stopped", **fields)
    assert [(e["step"], e.get("loss"), e.get("val_loss")) for e in log] == [
        (e["step"], e.get("loss"), e.get("val_loss")) for e in expected
    ]
    names = ["vae/diffusion_pytorch_model.safetensors"] if stage == "vae" else ["pretrained_unet.safetensors"]
    names += ["text_encoder/model.safetensors"] * (stage == "unet")
    for name in names:
        assert_equal(load_file(tmp_path / "stopped" / name), load_file(tmp_path / "whole" / name), **EXACT)
    assert not list((tmp_path / "stopped").glob("*_state.pt"))


def test_a_damaged_state_is_told(train, tmp_path):
    (tmp_path / "vae_state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="vae_state.pt', the state of an unfinished training, is damaged"):
        train(tmp_path, sd__stage="vae")


@pytest.mark.slow
def test_two_processes_equal_one(model, base, config_file, tmp_path):
    fields = base | {"pretrained__model": model[0], "sd__gradient_accumulation_steps": 2}
    for name, processes, batch in (("one", 1, 8), ("two", 2, 4)):
        settings = fields | {"sd__output": tmp_path / name, "sd__batch_size": batch}
        succeed("train_sd.py", *options(config_file, **settings), processes=processes)
    one, two = (entries(tmp_path / name / "finetune.jsonl") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "val_loss"):
            assert first.get(key, 0) == pytest.approx(second.get(key, 0), rel=1e-5)
    assert_same_training(unet_of(tmp_path / "one"), unet_of(tmp_path / "two"))
    assert_equal(
        {f"{i}": value for i in range(48) for value in LatentShards(tmp_path / "one" / "latents" / "train")[i][:1]},
        {f"{i}": value for i in range(48) for value in LatentShards(tmp_path / "two" / "latents" / "train")[i][:1]},
        **EXACT,
    )


@pytest.mark.slow
def test_another_model_or_other_images_do_not_resume(model, base, train, tmp_path, monkeypatch):
    """A state belongs to frozen weights and to pictures, which no setting of `sd` tells apart."""
    seen = {}

    def keep(self, file, settings):
        seen[file] = settings
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "restore", keep)
    for name, fields in (
        ("usual", {"pretrained__model": str(model[0])}),
        ("seeded", {"pretrained__model": str(model[0]), "seed": 1}),
        ("vae", {"sd__stage": "vae"}),
        ("vae_of_others", {"sd__stage": "vae", "sd__csv": base["sd__val_csv"], "sd__val_csv": ""}),
    ):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / name, **fields)
    other = load_pipeline(model[0])
    other.unet.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "other_unet", pretrained__model=str(tmp_path / "other"))
    by_name = {file.parent.name: settings for file, settings in seen.items()}

    def differing(one, two):
        return {key for key, value in by_name[one].items() if value != by_name[two][key]}

    assert differing("usual", "seeded") == {"seed"} and differing("usual", "other_unet") == {"initial weights"}
    assert differing("vae", "vae_of_others") == {"images"}
