"""train_sd.py: a model from nothing, fine-tuning, every option; and what is refused."""

import json

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file
from script_tools import assert_same_training, options
from stage_tools import EXACT, SPLIT, assert_equal, entries, unet_of

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.from_scratch import build_tokenizer
from ddpo_pytorch.generator.latents import INDEX, LatentShards
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "stage_tools"]


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

    # a frozen UNet in half precision, merged in float32
    train(tmp_path / "bf16", **fields, mixed_precision="bf16", sd__grid_every=4)
    assert (tmp_path / "bf16" / "finetune_000004.png").is_file()
    before, adapters = (
        load_pipeline(model[0], dtype=torch.bfloat16).unet.state_dict(),
        load_file(tmp_path / "bf16" / "pytorch_lora_weights.safetensors"),
    )
    for name, value in unet_of(tmp_path / "bf16").items():
        key = f"unet.{name.removesuffix('.weight')}"
        expected = before[name].float()
        if f"{key}.lora_A.weight" in adapters:
            expected = expected + adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_every_option_changes_what_it_should(model, train, tmp_path):
    model = {"pretrained__model": str(model[0])}
    usual = train(tmp_path / "usual", **model)
    weights = unet_of(tmp_path / "usual")

    train(tmp_path / "checkpointing", **model, sd__gradient_checkpointing=True)
    assert_same_training(weights, unet_of(tmp_path / "checkpointing"))

    changes = {
        "snr": {"sd__min_snr_gamma": 1.0},
        "no_dropout": {"sd__caption_dropout": 0.0},
        "last_weights": {"sd__ema_decay": 0.0},
        "seed": {"seed": 1},
        "bf16": {"mixed_precision": "bf16"},
        "skip_broken": {"sd__skip_broken": True, "seed": 2},
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
    fields["dataset__csv"] = str(world / SPLIT.format("val"))
    run_main("extract_dataset_latents.py", config_file, logdir=str(tmp_path / "val"), **fields)
    latents, val = (str(tmp_path / name / "latents") for name in ("real", "val"))
    train(tmp_path / "images", pretrained__model=str(folder))
    train(tmp_path / "latents", pretrained__model=str(folder), sd__latents=latents, sd__csv="", sd__data_path="",
          sd__val_csv="", sd__val_latents=val)  # fmt: skip
    with pytest.raises(UserError, match="training and validation latents share images"):
        train(tmp_path / "y", pretrained__model=str(folder), sd__latents=latents, sd__val_latents=latents)
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
        ({"sd__learning_rate": 0.0}, "sd.learning_rate is 0.0"),
        ({"sd__batch_size": 100, "sd__stage": "vae"}, "48 items are fewer than a batch of 100"),
        ({"sd__vae_channels": (8, 9)}, "channels multiples of 8"),
        ({"sd__latents": "/nowhere"}, "'/nowhere' holds no complete latents"),
        ({"sd__output": ""}, "sd.output is empty"),
        ({"sd__stage": "vae", "sd__image_size": 30}, "sd.image_size is 30; it must be a multiple of 4"),
        ({"sd__val_csv": "TRAIN"}, r"is in .*phantom_train.csv' \(train\) and in .*phantom_train.csv' \(val\); keep"),
        ({"sd__use_8bit_adam": True, "sd__stage": "vae"}, "use_8bit_adam=True needs bitsandbytes"),
    ],
)
def test_bad_input(fields, message, train, base, tiny_pipeline_dir, tmp_path):
    fields = {key: base["sd__csv"] if value == "TRAIN" else value for key, value in fields.items()}
    with pytest.raises(UserError, match=message):
        train(tmp_path / "x", **{"pretrained__model": str(tiny_pipeline_dir)} | fields)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


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
