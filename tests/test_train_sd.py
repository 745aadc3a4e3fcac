"""train_sd.py: a model from scratch, fine-tuning, BERT, pools, options; resuming, two processes; bad input."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from ml_collections import ConfigDict
from refusals import refused
from safetensors.torch import load_file, save_file
from sample_sets import write_samples
from script_tools import assert_same_training, load_config, load_module, options, read_lines, stopped_at_save, succeed
from stage_tools import SPLIT, assert_equal, unet_of
from torch.utils.data import default_collate

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import read_log, write_log
from ddpo_pytorch.generator.finetune_data import MixedLatents, settings_of
from ddpo_pytorch.generator.finetune_losses import CaptionTable, NoiseLoss
from ddpo_pytorch.generator.from_scratch import build_tokenizer
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.lora import add_lora, lora_parameters, merged_state_dict
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import has_mask
from ddpo_pytorch.utils.randomness import BatchDraws, Stream
from ddpo_pytorch.utils.training_state import TrainState


@pytest.mark.slow
def test_a_model_from_scratch(model):
    for stage in ("vae", "unet"):
        log = read_lines(model / f"{stage}.jsonl")
        assert [entry["step"] for entry in log if entry.get("images_per_second", 0) > 0] == [1, 2, 3, 4]
        validated = {entry["step"]: entry["val_loss"] for entry in log if "val_loss" in entry}
        assert list(validated) == [1, 2, 4] and validated[4] < validated[1]
        assert (model / f"{stage}_000004.png").is_file()
    pipe = load_pipeline(model)
    assert_equal(unet_of(model), pipe.unet.state_dict())
    latents = LatentShards(model / "latents" / "train")
    scaled = torch.stack([latents[index][0] for index in range(48)]).float() * pipe.vae.config.scaling_factor
    assert 0.7 < scaled.std() < 1.4


def test_the_tokenizer_is_always_the_same_and_loses_nothing():
    one, two = build_tokenizer(CAPTIONS), build_tokenizer(CAPTIONS[::-1])
    assert one.get_vocab() == two.get_vocab()
    tokens = one(list(CAPTIONS)).input_ids
    assert tokens == two(list(CAPTIONS)).input_ids and len({tuple(ids) for ids in tokens}) == 32
    for caption, ids in zip(CAPTIONS, tokens, strict=True):
        spelled = one.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert spelled == caption.lower().replace(" ", "") and len(ids) < 30


@pytest.mark.slow
def test_adapters_of_a_frozen_unet_in_half_precision_are_merged_in_float32(model, train_stage, tmp_path):
    fields = {"pretrained__model": str(model), "sd__use_lora": True, "sd__lora_rank": 2, "sd__learning_rate": 0.1}
    train_stage(tmp_path, **fields, mixed_precision="bf16", sd__grid_every=4)
    assert (tmp_path / "finetune_000004.png").is_file()
    before = load_pipeline(model, dtype=torch.bfloat16).unet.state_dict()
    adapters = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, value in unet_of(tmp_path).items():
        key, expected = f"unet.{name.removesuffix('.weight')}", before[name].float()
        if f"{key}.lora_A.weight" in adapters:
            change = adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
            assert change.abs().max() > 1e-3
            expected = expected + change
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_a_whole_model_has_its_adapters_merged(bert_pipeline_dir, tmp_path):
    pipe = load_pipeline(bert_pipeline_dir, dtype=torch.bfloat16)
    add_lora(pipe.unet, 2, ("to_q",), seed=0)
    for parameter in lora_parameters(pipe.unet):
        parameter.data += 0.1
    expected = merged_state_dict(pipe.unet)
    sd = ConfigDict({"stage": "finetune", "text_encoder": "bert", "train_text_encoder": False})
    stage = SimpleNamespace(config=ConfigDict({"sd": sd}), pipe=pipe, output=tmp_path)
    load_module("scripts/train_sd.py").DiffusionStage.finish(stage)
    assert_equal(load_pipeline(tmp_path).unet.state_dict(), expected)
    assert_equal(unet_of(tmp_path), expected)


@pytest.mark.slow
def test_every_option_changes_what_it_should(model, train_stage, tmp_path):
    start = {"pretrained__model": str(model)}
    usual = train_stage(tmp_path / "usual", **start)
    weights = unet_of(tmp_path / "usual")
    train_stage(tmp_path / "checkpointing", **start, sd__gradient_checkpointing=True)
    assert_same_training(weights, unet_of(tmp_path / "checkpointing"))

    changes = {
        "snr": {"sd__min_snr_gamma": 1.0},
        "plain": {"sd__caption_dropout": 0.0, "sd__ema_decay": 0.0, "sd__limit": 16, "sd__val_images": 3},
        "seed": {"seed": 1, "sd__skip_broken": True, "mixed_precision": "bf16"},
        "constant": {"sd__val_csv": "", "sd__lr_schedule": "constant", "sd__warmup_steps": 2},
    }
    logs = {name: train_stage(tmp_path / name, **start, **fields) for name, fields in changes.items()}
    for name, log in logs.items():
        assert any("val_loss" in entry for entry in log) == (name != "constant")
        assert not all(value.equal(weights[key]) for key, value in unet_of(tmp_path / name).items()), name
    # validation is unweighted: after the first step the weights hardly differ
    first = [next(entry["val_loss"] for entry in log if "val_loss" in entry) for log in (usual, logs["snr"])]
    assert first[0] == pytest.approx(first[1], rel=1e-2) and logs["snr"][0]["loss"] < 0.9 * usual[0]["loss"]
    assert len(LatentShards(tmp_path / "plain" / "latents" / "val")) == 3
    rates = [[entry["learning_rate"] for entry in log if "loss" in entry] for log in (usual, logs["constant"])]
    assert rates[0] == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 0.0], abs=1e-9) and rates[1] == [5e-4, 1e-3, 1e-3, 1e-3]


@pytest.mark.slow
def test_extracted_latents_take_the_place_of_images(model, world, train_stage, run_main, config_file, tmp_path):
    start = {"pretrained__model": str(model), "sd__num_steps": 2}
    fields = {"pretrained__model": str(model), "dataset__data_path": str(world / "images"), "dataset__image_size": 32}
    for name in ("train", "val"):
        fields |= {"dataset__csv": str(world / SPLIT.format(name)), "logdir": str(tmp_path / f"{name}_samples")}
        run_main("extract_dataset_latents.py", config_file, **fields)
    latents, val = (str(tmp_path / f"{name}_samples" / "latents") for name in ("train", "val"))
    train_stage(tmp_path / "images", **start)
    given = {"sd__latents": latents, "sd__csv": "", "sd__data_path": "", "sd__val_csv": "", "sd__val_latents": val}
    train_stage(tmp_path / "latents", **start, **given)
    assert not (tmp_path / "latents" / "latents").exists()
    assert_equal(unet_of(tmp_path / "latents"), unet_of(tmp_path / "images"))

    start["sd__latents"] = latents
    same, count = Path(shutil.copytree(latents, tmp_path / "same")), len(LatentShards(latents))
    (same / "index.json").write_text(json.dumps(LatentShards(latents).index | {"csv_sha256": "another table"}))
    for validation in (latents, str(same)):
        refused(f"share {count} images", train_stage, tmp_path / "y", **start, sd__val_latents=validation)
    refused("image_size=32, .* 64", train_stage, tmp_path / "y", **start, sd__image_size=64)
    shard = tmp_path / "train_samples" / "latents" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused("shard_00000.safetensors' is damaged", train_stage, tmp_path / "y", **start)
    assert not list((tmp_path / "y").glob("*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sd__stage": "unet"}, "vae' holds no VAE"),
        ({"sd__use_lora": True, "sd__stage": "vae"}, "sd.use_lora is True.* sd.stage=finetune.* 'vae'"),
        ({"sd__caption_dropout": 1.5}, r"sd.caption_dropout is 1.5.*\[0, 1\)"),
        ({"sd__batch_size": 100, "sd__stage": "vae"}, "48 items .* 100"),
        ({"sd__grid_every": 2, "sample__num_steps": 1000}, "sample.num_steps is 1000.* 999"),
        ({"sd__vae_channels": (8, 9)}, r"sd.vae_channels is \(8, 9\).* 8"),
        ({"sd__vae_channels": ()}, r"sd.vae_channels is \(\)"),
        ({"sd__unet_channels": (0, 8)}, r"sd.unet_channels is \(0, 8\)"),
        ({"sd__unet_channels": ("a", 8)}, r"sd.unet_channels is \('a', 8\)"),
        ({"sd__unet_attention": (True,)}, r"sd.unet_channels and sd.unet_attention .*\(2, 1\)"),
        ({"sd__text_width": 56}, "sd.text_width is 56.* 16"),
        ({"sd__stage": "vae", "sd__image_size": 30}, "sd.image_size is 30.* 4"),
        ({"sd__stage": "vae", "sd__vae_crop": 10}, "sd.vae_crop is 10.* 4"),
        ({"sd__stage": "vae", "sd__adversarial_coef": 0.5}, "sd.adversarial_coef .* sd.vae"),
        ({"sd__stage": "vae", "sd__perceptual_coef": 1.0}, "sd.perceptual_net is ''"),
        ({"sd__val_csv": "TRAIN"}, "phantom_train.csv' and .*phantom_train.csv'"),
        ({"sd__use_8bit_adam": True, "sd__stage": "vae"}, "use_8bit_adam=True needs bitsandbytes"),
    ],
)
def test_bad_input(fields, message, train_stage, base, tiny_pipeline_dir, tmp_path):
    fields = {key: base["sd__csv"] if value == "TRAIN" else value for key, value in fields.items()}
    refused(message, train_stage, tmp_path / "x", **{"pretrained__model": str(tiny_pipeline_dir)} | fields)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_bert_is_trained_from_scratch_and_takes_clips_place_frozen_or_slowly_trained(model, train_stage, tmp_path):
    bert = tmp_path / "bert"
    shutil.copytree(model / "vae", bert / "vae")
    start = {"sd__text_encoder": "bert", "sd__caption_dropout": 0.0, "sd__num_steps": 1}
    train_stage(bert, **start, sd__stage="unet", sd__text_tokens=20)
    pipe = load_pipeline(bert)
    assert has_mask(pipe.text_encoder) and pipe.tokenizer.model_max_length == 20

    def weights_of(folder, part):
        return load_file(next((folder / part).glob("*.safetensors")))

    start |= {"pretrained__model": str(model), "sd__bert": str(bert), "sd__text_tokens": 16, "sd__warmup_steps": 0}
    start["sd__ema_decay"] = 0.0
    for trained in (False, True):
        folder = tmp_path / str(trained)
        train_stage(folder, **start, sd__train_text_encoder=trained)
        assert load_pipeline(folder).tokenizer.model_max_length == 16
        # Adam's first step is as long as its learning rate: a tenth of the UNet's for the text encoder
        for part, source, step in (("unet", model, 1e-3), ("text_encoder", bert, 1e-4 * trained)):
            old, new = weights_of(source, part), weights_of(folder, part)
            moved = max(float((old[name] - new[name]).abs().max()) for name in old)
            assert moved == pytest.approx(step, rel=0.05, abs=0)


@pytest.mark.slow
def test_a_pool_is_mixed_with_real_images(model, train_stage, tmp_path):
    """Five images as generate.py writes them, of which one did not pass."""
    log = read_log(write_samples(tmp_path / "pool", {CAPTIONS[0]: 3, CAPTIONS[1]: 2}, seed=0, size=32))
    scores = [{"selector": 0.5, "policy": 0.2 * (number + 1), "passed": number != 3} for number in range(5)]
    write_log(tmp_path / "pool", [entry | scored for entry, scored in zip(log, scores, strict=True)])
    start = {"pretrained__model": str(model), "sd__val_csv": "", "sd__num_steps": 2}
    train_stage(tmp_path / "mixed", **start, sd__pool=str(tmp_path / "pool"))
    real, pool = (LatentShards(tmp_path / "mixed" / "latents" / name) for name in ("train", "pool"))
    assert len(pool) == 4 and pool.captions == sorted(CAPTIONS[:2])
    both = MixedLatents(real, pool, [0.2, 0.4, 0.6, 1.0], 0.75)
    assert len(both) == len(real) + round(len(real) / 3)
    weights = torch.stack([both[position][3] for position in range(len(both))])
    assert (weights[: len(real)] == 1).all()
    expected = torch.tensor([0.2, 0.4, 0.6, 1.0]) / 0.55
    shown = torch.arange(count := len(both) - len(real)) * 4 // count
    torch.testing.assert_close(weights[len(real) :], expected[shown])
    assert {pool.captions[both[len(real) + index][2]] for index in range(count)} == set(CAPTIONS[:2])
    refused("scores", MixedLatents, real, pool, [0, 0, 0, 0], 0.5)
    write_log(tmp_path / "none", [entry | {"passed": False} for entry in read_log(tmp_path / "pool")])
    start["sd__pool"] = str(tmp_path / "none")
    refused("no image that the Selector passed", train_stage, tmp_path / "out", **start)


def test_a_pool_larger_than_its_share_is_seen_whole():
    """Of 7 chosen and 6 real images, half real: two passes over the real ones; all chosen ones, none thrice."""
    real, pool = ([(f"{name}{n}", 0, 0) for n in range(count)] for name, count in (("real", 6), ("pool", 7)))
    both = MixedLatents(real, pool, [1.0] * 7, 0.5)
    seen = Counter(both[position][0] for position in range(len(both)))
    assert {seen[name] for name, *_ in real} == {2} and {seen[name] for name, *_ in pool} == {1, 2}
    assert sum(seen[name] for name, *_ in pool) == 12


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "decoder", "unet", "finetune"])
def test_a_stopped_training_resumes_to_the_same_end(stage, model, base, train_stage, tmp_path):
    fields = {"sd__stage": stage, "sd__num_steps": 3, "sd__save_every": 1, "sd__gradient_accumulation_steps": 2}
    fields["pretrained__model"] = str(model)
    whole, part = tmp_path / "whole", tmp_path / "part"
    if stage == "decoder":
        stage = fields["sd__stage"] = "vae"
        file = tmp_path / "tinynet_e.safetensors"
        save_file(timm.create_model("tinynet_e").state_dict(), file)
        fields |= {"sd__vae": str(model / "vae"), "sd__vae_crop": 24, "sd__adversarial_coef": 0.5}
        fields |= {"sd__perceptual_coef": 0.1, "sd__perceptual_net": str(file)}
    if stage == "unet":
        for folder in (whole, part):
            shutil.copytree(model / "vae", folder / "vae")
    expected = train_stage(whole, **fields)
    with stopped_at_save(2, written=False):
        train_stage(part, **fields)
    assert len(read_lines(part / f"{stage}.jsonl")) > 2  # step 2 will be repeated
    refused("sd.learning_rate=0.001, now it is 0.1", train_stage, part, **fields, sd__learning_rate=0.1)
    if stage == "vae":
        refused("with images=", train_stage, part, **fields, sd__csv=base["sd__val_csv"], sd__val_csv="")
        wild = fields | {"sd__num_steps": 9, "sd__learning_rate": 1e30}
        refused("the loss is (nan|inf) at step .* sd.learning_rate", train_stage, tmp_path / "nan", **wild)
        assert not (tmp_path / "nan" / "vae").exists()
    log = train_stage(part, **fields)
    for key in ("step", "loss", "val_loss"):
        assert [entry.get(key) for entry in log] == [entry.get(key) for entry in expected]
    names = ["vae/diffusion_pytorch_model.safetensors"] if stage == "vae" else ["pretrained_unet.safetensors"]
    names += ["text_encoder/model.safetensors"] * (stage == "unet")
    for name in names:
        assert_equal(load_file(part / name), load_file(whole / name))
    assert not list(part.glob("*_state.pt"))


@pytest.mark.parametrize(("stage", "name"), [("vae", "images"), ("finetune", r"latents\[0\]")])
def test_a_training_does_not_resume_on_replaced_images(stage, name, train_stage, base, tiny_pipeline_dir, tmp_path):
    images = shutil.copytree(base["sd__data_path"], tmp_path / "images")
    fields = {"sd__stage": stage, "sd__data_path": str(images), "sd__limit": 8, "sd__val_csv": ""}
    fields |= {"sd__save_every": 1, "pretrained__model": str(tiny_pipeline_dir)}
    with stopped_at_save(2, written=False):
        train_stage(tmp_path / "out", **fields)
    for path in images.iterdir():
        save_image(path, torch.zeros(3, 32, 32))
    refused(f"{stage}_state.pt.* with {name}=", train_stage, tmp_path / "out", **fields)


def test_a_damaged_state_is_refused_and_one_left_after_the_end_removed(train_stage, tmp_path, monkeypatch):
    fields, state = {"sd__stage": "vae", "sd__save_every": 1, "sd__num_steps": 3}, tmp_path / "vae_state.pt"
    save = TrainState.save

    def damage(trained, **progress):
        save(trained, **progress)
        content = torch.load(state)
        content["state"]["parts"][part] = 3
        torch.save(content, state)

    for part in ("weights", "optimizer", "average", ""):
        state.unlink(missing_ok=True)
        if part:
            monkeypatch.setattr(TrainState, "save", damage)
            with stopped_at_save(2, written=False):
                train_stage(tmp_path, **fields)
        else:
            state.write_bytes(b"torn")
        refused("vae_state.pt'", train_stage, tmp_path, **fields)
    (tmp_path / "vae").mkdir()
    refused("vae' exists already", train_stage, tmp_path, sd__stage="vae")
    assert not state.exists()


def test_settings_without_effect_on_the_result_are_not_compared():
    """Paths, as of a folder that was copied, and how often something is logged."""
    config = load_config("base").get_config()
    before = settings_of(config, 1, {})
    paths = ("output", "data_path", "csv", "val_csv", "latents", "val_latents", "cache_dir", "vae", "bert", "pool")
    config.sd.update(dict.fromkeys(paths, "elsewhere") | {"log_every": 7, "num_workers": 3})
    assert settings_of(config, 1, {}) == before
    config.sd.learning_rate = 1.0
    assert settings_of(config, 1, {}) != before


@pytest.mark.slow
def test_two_processes_equal_one(model, train_stage, base, config_file, tmp_path):
    fields = {"pretrained__model": str(model), "sd__gradient_accumulation_steps": 2}
    one = train_stage(tmp_path / "one", **fields)
    fields = base | fields | {"sd__output": tmp_path / "two", "sd__batch_size": 4}
    succeed("train_sd.py", *options(config_file, **fields), processes=2)
    for first, second in zip(one, read_lines(tmp_path / "two" / "finetune.jsonl"), strict=True):
        for key in ("loss", "val_loss"):
            assert first.get(key, 0) == pytest.approx(second.get(key, 0), rel=1e-5)
    assert_same_training(unet_of(tmp_path / "one"), unet_of(tmp_path / "two"))
    assert_equal(*(load_file(tmp_path / name / "latents/train/shard_00000.safetensors") for name in ("one", "two")))


@pytest.mark.slow
def test_membership_of_a_model_and_of_trained_weights(model, base, run_main, config_file, tmp_path):
    """The mean loss is that of `NoiseLoss` over all draws; the same weights make no difference."""
    fields = base | {"pretrained__model": str(model), "sd__output": str(tmp_path), "seed": 5}
    membership = partial(run_main, "membership.py", config_file)
    membership(**fields, load_from=str(model / "pretrained_unet.safetensors"))
    result = json.loads((tmp_path / "membership.json").read_text())
    assert result["difference"]["value"] == 0 and result["base"] == result["load_from"]
    val, pipe = LatentShards(tmp_path / "latents" / "val"), load_pipeline(model)
    loss = NoiseLoss(pipe, CaptionTable(pipe, val.captions, trained=False)).eval()
    losses, items = [], [val[index] for index in range(len(val))]
    with torch.no_grad():
        for number, start in enumerate(range(0, len(items), 8)):
            part = items[start : start + 8]
            for step in range(16):
                draws = BatchDraws(5, Stream.VALIDATION, 16 * number + step, 8, kept=len(part))
                losses.append(loss(default_collate(part), draws).item() * len(part) / 16)
    assert result["base"]["val_loss"]["value"] == pytest.approx(sum(losses) / len(items), rel=1e-4)
    elsewhere = fields | {"sd__output": str(tmp_path / "x")}
    latents = {"sd__latents": str(tmp_path / "latents" / "train"), "sd__val_latents": str(tmp_path / "latents" / "val")}
    latents |= {"sd__csv": "", "sd__val_csv": "", "sd__data_path": "", "mixed_precision": "bf16"}
    membership(**elsewhere | latents)  # whose fingerprint is that of the VAE in float32
    half = json.loads((tmp_path / "x" / "membership.json").read_text())["base"]["val_loss"]
    assert half["value"] == pytest.approx(result["base"]["val_loss"]["value"], rel=0.02) and half != result["base"]
    refused("is the result of mixed_precision='bf16'", membership, **elsewhere)
    refused("sd.val_csv", membership, **fields | {"sd__val_csv": "", "sd__output": str(tmp_path / "y")})
    changed = {"seed": 6, "load_from": result["settings"]["load_from"]}
    refused("membership.json' is the result of seed=5, now it is 6", membership, **fields | changed)
    assert json.loads((tmp_path / "membership.json").read_text()) == result


def test_membership_refuses_bad_seeds_weights_and_losses(base, tiny_pipeline_dir, run_main, config_file, tmp_path):
    """A random model and 4 + 4 images. AUCs of NaN would look like chance."""
    fields = base | {"pretrained__model": str(tiny_pipeline_dir), "sd__output": str(tmp_path / "out")}
    membership = partial(run_main, "membership.py", config_file, **fields | {"sd__limit": 4, "sd__val_images": 4})
    refused("seed is -1", membership, seed=-1)  # before images are read
    assert not (tmp_path / "out").exists()
    (tmp_path / "unet.safetensors").write_bytes(b"")
    for weights in ("nowhere", "unet.safetensors"):
        refused(weights, membership, load_from=str(tmp_path / weights))  # before images are encoded
    assert not (tmp_path / "out" / "latents").exists()
    unet = load_pipeline(tiny_pipeline_dir).unet
    unet.conv_out.bias.data.fill_(3e38)
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    refused("losses of '.*/unet.safetensors' are not finite", membership, load_from=str(tmp_path / "unet.safetensors"))
    assert not (tmp_path / "out" / "membership.json").exists()
