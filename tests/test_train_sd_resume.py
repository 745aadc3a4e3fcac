"""train_sd.py stopped and resumed, and with two processes: the same end."""

import shutil

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from script_tools import assert_same_training, load_module, options, succeed
from stage_tools import EXACT, assert_equal, entries, unet_of

from ddpo_pytorch.generator.finetune_data import settings_of
from ddpo_pytorch.generator.finetune_state import Training
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.training_state import save_state

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
    with pytest.raises(UserError, match="sd.learning_rate=0.001.* 0.1"):
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
@pytest.mark.parametrize(
    "change",
    [{"step": "1"}, {"parameters": 3}, {"parameters": []}, {"optimizer": []}, {"schedule": {}}, {"average": 3}, None],
    ids=str,
)
def test_a_state_of_other_content_is_told(train, tmp_path, monkeypatch, change):
    written = []

    def stop(path, state, belongs_to):
        content = {key: value for key, value in state.items() if change is not None} | (change or {})
        written.append(save_state(path, content, belongs_to))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ddpo_pytorch.utils.training_state.save_state", stop)
        train(tmp_path, sd__stage="vae", sd__save_every=1, sd__num_steps=2)
    assert written
    with pytest.raises(UserError, match="vae_state.pt") as caught:
        train(tmp_path, sd__stage="vae", sd__save_every=1, sd__num_steps=2)
    assert "\n" not in str(caught.value)


def test_what_a_kill_after_the_end_leaves_is_removed(train, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae_state.pt").write_bytes(b"state")
    with pytest.raises(UserError, match="vae' exists already"):
        train(tmp_path, sd__stage="vae")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


# a setting, another value, and the stages whose result depends on it
READ = [
    ("vae_kl_weight", 1.0, {"vae"}),
    ("vae_channels", (8, 8), {"vae"}),
    ("unet_channels", (8, 8), {"unet"}),
    ("text_width", 8, {"unet"}),
    ("caption_dropout", 0.5, {"unet", "finetune"}),
    ("min_snr_gamma", 5.0, {"unet", "finetune"}),
    ("text_encoder", "bert", {"unet", "finetune"}),
    ("train_text_encoder", True, {"finetune"}),
    ("use_lora", True, {"finetune"}),
    ("real_share", 0.9, {"finetune"}),
    ("lora_rank", 9, set()),  # without use_lora
    ("text_tokens", 9, set()),  # of BERT
    ("learning_rate", 1.0, {"vae", "unet", "finetune"}),
]
PLACES = {
    **dict.fromkeys(("output", "data_path", "csv", "val_csv", "latents", "val_latents", "cache_dir"), "elsewhere"),
    **dict.fromkeys(("vae", "bert", "pool"), ""),
}


@pytest.mark.parametrize("stage", ["vae", "unet", "finetune"])
def test_only_settings_that_the_result_depends_on_are_compared(stage):
    """Not where things lie, as in a folder that was copied, nor what another stage reads."""
    config = load_module(ROOT / "config" / "base.py").get_config()
    config.sd.stage, config.sd.pool, config.sd.bert = stage, "pool", "bert"

    def changed(fields):
        other = config.copy_and_resolve_references()
        other.sd.update(fields)
        return settings_of(other, 1, {}) != settings_of(config, 1, {})

    assert not changed({key: value for key, value in PLACES.items() if key != "pool"})
    for name, value, stages in READ:
        assert changed({name: value}) is (stage in stages), name


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
