"""train_sd.py: a model from nothing, fine-tuning, every option; resumed, with two processes, and what is refused."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import run_script
from safetensors.torch import load_file
from script_tools import options, succeed

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.scratch import build_tokenizer
from ddpo_pytorch.generator.training import Training

pytest_plugins = ["script_tools"]
SPLIT = "splits/phantom_{}.csv"


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """Settings of all stages on the small world, with a cache of their own."""
    settings = {"mixed_precision": "no", "sd__data_path": str(world / "images"), "sd__image_size": 32}
    settings |= {
        f"sd__{key}": str(world / SPLIT.format(split)) for key, split in (("csv", "train"), ("val_csv", "val"))
    }
    settings |= {"sd__num_steps": 4, "sd__batch_size": 8, "sd__log_every": 1, "sd__val_every": 2, "sd__grid_every": 0}
    settings |= {"sd__save_every": 0, "sd__warmup_steps": 1, "sd__learning_rate": 1e-3, "sample__num_steps": 2}
    settings |= {"sd__vae_channels": (8, 8, 8), "sd__unet_channels": (16, 16), "sd__unet_attention": (False, True)}
    settings |= {"sd__text_width": 16, "sd__text_layers": 1, "sd__cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return settings


@pytest.fixture
def train(run_main, config_file, base):
    """Function (output, fields): train_sd.py's main in this process; returns its log entries."""

    def run(output, **fields):
        try:
            run_main("train_sd.py", config_file, **base | {"sd__output": str(output)} | fields)
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        return entries(output / f"{fields.get('sd__stage', 'finetune')}.jsonl")

    return run


@pytest.fixture(scope="module")
def model(base, config_file, tmp_path_factory):
    """A folder with the outcome of stages "vae" and "unet", made by real runs of the script; and what these said."""
    folder = tmp_path_factory.mktemp("sd")
    said = {}
    for stage in ("vae", "unet"):
        fields = base | {"sd__output": folder, "sd__stage": stage, "sd__grid_every": 4, "sd__num_workers": 1}
        said[stage] = succeed("train_sd.py", *options(config_file, **fields)).stderr
    return folder, said


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def unet_of(folder):
    return load_file(folder / "pretrained_unet.safetensors")


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}


@pytest.mark.slow
def test_a_model_from_nothing(model, train):
    folder, said = model
    for stage in ("vae", "unet"):
        log = entries(folder / f"{stage}.jsonl")
        steps = [entry["step"] for entry in log if "loss" in entry]
        assert steps == [1, 2, 3, 4] and all(entry["images_per_second"] > 0 for entry in log if "loss" in entry)
        validated = {entry["step"]: entry["val_loss"] for entry in log if "val_loss" in entry}
        assert list(validated) == [1, 2, 4] and validated[4] < validated[1]
        assert (folder / f"{stage}_000004.png").is_file() and "validation loss" in said[stage]
    assert "images decoded at" in said["vae"] and "latents of 48 images" in said["unet"]
    pipe = load_pipeline(folder)
    assert_equal(unet_of(folder), pipe.unet.state_dict(), **EXACT)
    latents = LatentShards(folder / "latents" / "train")
    scaled = torch.stack([latents[index][0] for index in range(48)]).float() * pipe.vae.config.scaling_factor
    assert 0.7 < scaled.std() < 1.4
    with pytest.raises(UserError, match="exists already; give another folder"):
        train(folder, sd__stage="unet")


def test_the_tokenizer_is_always_the_same_and_loses_nothing():
    one, two = (build_tokenizer(captions) for captions in (CAPTIONS, CAPTIONS[::-1]))
    assert one.get_vocab() == two.get_vocab()
    tokens = one(list(CAPTIONS)).input_ids
    assert tokens == two(list(CAPTIONS)).input_ids and len({tuple(ids) for ids in tokens}) == 32
    for caption, ids in zip(CAPTIONS, tokens, strict=True):
        spelled = one.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert spelled == caption.lower().replace(" ", "") and len(ids) < 30


def test_stages_come_in_order(train, tmp_path):
    with pytest.raises(UserError, match="holds no VAE; train it first"):
        train(tmp_path / "x", sd__stage="unet")


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
    assert_equal(unet_of(tmp_path / "one"), unet_of(tmp_path / "two"), rtol=1e-4, atol=1e-6)
    assert_equal(
        {f"{i}": value for i in range(48) for value in LatentShards(tmp_path / "one" / "latents" / "train")[i][:1]},
        {f"{i}": value for i in range(48) for value in LatentShards(tmp_path / "two" / "latents" / "train")[i][:1]},
        **EXACT,
    )


@pytest.mark.slow
def test_lora_is_saved_beside_the_merged_unet(model, train, tmp_path):
    fields = {"pretrained__model": str(model[0]), "sd__use_lora": True, "sd__lora_rank": 2, "sd__learning_rate": 0.1}
    train(tmp_path, **fields)
    pipe, merged = load_pipeline(model[0]), load_pipeline(model[0], unet_path=tmp_path / "pretrained_unet.safetensors")
    latents, timesteps, embeds = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 16)
    with torch.no_grad():
        plain = pipe.unet(latents, timesteps, embeds).sample
        load_lora(pipe.unet, tmp_path)
        adapted, whole = (p.unet(latents, timesteps, embeds).sample for p in (pipe, merged))
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_every_option_changes_what_it_should(model, train, tmp_path):
    model = {"pretrained__model": str(model[0])}
    usual = train(tmp_path / "usual", **model)
    weights = unet_of(tmp_path / "usual")

    train(tmp_path / "checkpointing", **model, sd__gradient_checkpointing=True)
    assert_equal(unet_of(tmp_path / "checkpointing"), weights, rtol=1e-4, atol=1e-6)

    changes = {
        "snr": {"sd__min_snr_gamma": 1.0},
        "no_dropout": {"sd__caption_dropout": 0.0},
        "last_weights": {"sd__ema_decay": 0.0},
        "seed": {"seed": 1},
        "bf16": {"mixed_precision": "bf16"},
        "crop": {"sd__resize": "crop", "sd__image_size": 16, "sd__skip_broken": True},
        "no_validation": {"sd__val_csv": ""},
        "limit": {"sd__limit": 16, "sd__val_images": 3},
    }
    for name, fields in changes.items():
        log = train(tmp_path / name, **model, **fields)
        assert any("val_loss" in entry for entry in log) == (name != "no_validation")
        if name != "no_validation":
            assert not all(value.equal(weights[key]) for key, value in unet_of(tmp_path / name).items()), name
    # validation is unweighted: after the first step the weights hardly differ
    snr = entries(tmp_path / "snr" / "finetune.jsonl")
    first = [next(e["val_loss"] for e in log if "val_loss" in e) for log in (usual, snr)]
    assert first[0] == pytest.approx(first[1], rel=1e-2) and snr[0]["loss"] < 0.9 * usual[0]["loss"]
    assert len(LatentShards(tmp_path / "limit" / "latents" / "val")) == 3

    rates = [entry["learning_rate"] for entry in usual if "loss" in entry]
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 0.0], abs=1e-9)
    constant = train(tmp_path / "constant", **model, sd__lr_schedule="constant", sd__warmup_steps=2)
    assert [entry["learning_rate"] for entry in constant if "loss" in entry] == [5e-4, 1e-3, 1e-3, 1e-3]


@pytest.mark.slow
def test_extracted_latents_take_the_place_of_images(model, world, train, run_main, config_file, tmp_path):
    folder = model[0]
    fields = {"pretrained__model": str(folder), "dataset__data_path": str(world / "images")}
    fields |= {"dataset__image_size": 32, "dataset__csv": str(world / SPLIT.format("train"))}
    run_main("extract_dataset_latents.py", config_file, logdir=str(tmp_path / "real"), **fields)
    latents = str(tmp_path / "real" / "latents")
    train(tmp_path / "images", pretrained__model=str(folder))
    train(tmp_path / "latents", pretrained__model=str(folder), sd__latents=latents, sd__csv="", sd__data_path="",
          sd__val_csv="", sd__val_latents=latents)  # fmt: skip
    assert not (tmp_path / "latents" / "latents").exists()
    assert_equal(unet_of(tmp_path / "latents"), unet_of(tmp_path / "images"), **EXACT)

    index = tmp_path / "real" / "latents" / INDEX
    about = json.loads(index.read_text())
    index.write_text(json.dumps(about | {"vae_sha256": "other"}))
    for wrong, message in (({}, "made with vae_sha256='other'"), ({"sd__image_size": 64}, "made with vae_sha256")):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "y", pretrained__model=str(folder), sd__latents=latents, **wrong)
    index.write_text(json.dumps(about))
    with pytest.raises(UserError, match="made with image_size=32, this training has 64; extract them again"):
        train(tmp_path / "y", pretrained__model=str(folder), sd__latents=latents, sd__image_size=64)
    shard = tmp_path / "real" / "latents" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="shard_00000.safetensors' differs from the index; run the command"):
        train(tmp_path / "y", pretrained__model=str(folder), sd__latents=latents)
    assert not list((tmp_path / "y").glob("*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sd__csv": "/nowhere.csv"}, "/nowhere.csv"),
        ({"sd__data_path": "/nowhere"}, "/nowhere"),
        ({"sd__stage": "nope"}, "sd.stage is 'nope'; allowed are vae, unet, finetune"),
        ({"sd__lr_schedule": "linear"}, "sd.lr_schedule is 'linear'; allowed are cosine, constant"),
        ({"sd__text_encoder": "t5"}, "sd.text_encoder is 't5'; allowed are clip"),
        ({"sd__resize": "squash"}, "sd.resize is 'squash'; allowed are stretch, crop, pad"),
        ({"sd__use_lora": True, "sd__stage": "vae"}, "sd.use_lora=True needs sd.stage=finetune"),
        ({"sd__caption_dropout": 1.5}, r"sd.caption_dropout is 1.5; it must be in \[0, 1\)"),
        ({"sd__num_steps": 0}, "sd.num_steps is 0; it must be 1 or more"),
        ({"sd__gradient_accumulation_steps": 0}, "sd.gradient_accumulation_steps is 0"),
        ({"sd__save_every": -1}, "sd.save_every is -1; it must be 0 or more"),
        ({"sd__learning_rate": 0.0}, "sd.learning_rate is 0.0, which must be above 0"),
        ({"sd__batch_size": 100, "sd__stage": "vae"}, "48 items are fewer than a batch of 100"),
        ({"sd__vae_channels": (8, 9)}, "channels multiples of 8"),
        ({"sd__latents": "/nowhere"}, "'/nowhere' holds no complete latents"),
        ({"sd__output": ""}, "sd.output is empty"),
        ({"sd__use_8bit_adam": True, "sd__stage": "vae"}, "use_8bit_adam=True needs bitsandbytes"),
    ],
)
def test_bad_input(fields, message, train, tiny_pipeline_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "x", **{"pretrained__model": str(tiny_pipeline_dir)} | fields)
    assert not list(tmp_path.rglob("*.jsonl")) or "items" in message


@pytest.mark.slow
def test_a_fault_is_one_line(base, config_file, tmp_path):
    fields = base | {"sd__output": tmp_path, "sd__stage": "nope"}
    result = run_script("train_sd.py", *options(config_file, **fields))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: sd.stage is 'nope'")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops(model, train, tmp_path):
    with pytest.raises(UserError, match="the loss is (nan|inf) at step .*; lower sd.learning_rate"):
        train(tmp_path, pretrained__model=str(model[0]), sd__learning_rate=1e30, sd__num_steps=20)
    assert not (tmp_path / "pretrained_unet.safetensors").exists()
