"""train_sd.py: a model from scratch, fine-tuning, BERT, pools, every option; resuming, two processes; bad input."""

import math
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from script_tools import assert_same_training, load_module, options, run_in_process, succeed
from stage_tools import EXACT, SPLIT, assert_equal, entries, unet_of

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import folder_name, read_log, write_log
from ddpo_pytorch.generator.finetune_data import MixedLatents, settings_of
from ddpo_pytorch.generator.finetune_state import Training
from ddpo_pytorch.generator.from_scratch import build_tokenizer
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.lora import load_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import has_mask
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.training_state import save_state

pytest_plugins = ["script_tools", "stage_tools"]


@pytest.fixture(scope="module")
def bert_model(base, model, config_file, tmp_path_factory):
    """A model with a BERT from scratch and the autoencoder of `model`."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vae").symlink_to(model / "vae")
    fields = base | {"sd__output": str(folder), "sd__stage": "unet", "sd__text_encoder": "bert", "sd__text_tokens": 20}
    run_in_process("train_sd.py", config_file, **fields, sd__caption_dropout=0.1)
    return folder


@pytest.mark.slow
def test_a_model_from_scratch(model, train_stage):
    for stage in ("vae", "unet"):
        log = entries(model / f"{stage}.jsonl")
        steps = [entry["step"] for entry in log if "loss" in entry]
        assert steps == [1, 2, 3, 4] and all(entry["images_per_second"] > 0 for entry in log if "loss" in entry)
        validated = {entry["step"]: entry["val_loss"] for entry in log if "val_loss" in entry}
        assert list(validated) == [1, 2, 4] and validated[4] < validated[1]
        assert (model / f"{stage}_000004.png").is_file()
    pipe = load_pipeline(model)
    assert_equal(unet_of(model), pipe.unet.state_dict(), **EXACT)
    latents = LatentShards(model / "latents" / "train")
    scaled = torch.stack([latents[index][0] for index in range(48)]).float() * pipe.vae.config.scaling_factor
    assert 0.7 < scaled.std() < 1.4
    with pytest.raises(UserError, match="pretrained_unet.safetensors' exists already"):
        train_stage(model, sd__stage="unet")


def test_the_tokenizer_is_always_the_same_and_loses_nothing():
    one, two = (build_tokenizer(captions) for captions in (CAPTIONS, CAPTIONS[::-1]))
    assert one.get_vocab() == two.get_vocab()
    tokens = one(list(CAPTIONS)).input_ids
    assert tokens == two(list(CAPTIONS)).input_ids and len({tuple(ids) for ids in tokens}) == 32
    for caption, ids in zip(CAPTIONS, tokens, strict=True):
        spelled = one.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert spelled == caption.lower().replace(" ", "") and len(ids) < 30


@pytest.mark.slow
def test_lora_is_saved_with_the_merged_unet(model, train_stage, tmp_path):
    fields = {"pretrained__model": str(model), "sd__use_lora": True, "sd__lora_rank": 2, "sd__learning_rate": 0.1}
    train_stage(tmp_path, **fields)
    pipe, merged = load_pipeline(model), load_pipeline(model, unet_path=tmp_path / "pretrained_unet.safetensors")
    latents, timesteps, embeds = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 16)
    with torch.no_grad():
        plain = pipe.unet(latents, timesteps, embeds).sample
        load_lora(pipe.unet, tmp_path)
        adapted, whole = (p.unet(latents, timesteps, embeds).sample for p in (pipe, merged))
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3

    # a frozen UNet in half precision, merged in float32
    train_stage(tmp_path / "bf16", **fields, mixed_precision="bf16", sd__grid_every=4)
    assert (tmp_path / "bf16" / "finetune_000004.png").is_file()
    before = load_pipeline(model, dtype=torch.bfloat16).unet.state_dict()
    adapters = load_file(tmp_path / "bf16" / "pytorch_lora_weights.safetensors")
    for name, value in unet_of(tmp_path / "bf16").items():
        key = f"unet.{name.removesuffix('.weight')}"
        expected = before[name].float()
        if f"{key}.lora_A.weight" in adapters:
            expected = expected + adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_every_option_changes_what_it_should(model, train_stage, tmp_path):
    start = {"pretrained__model": str(model)}
    usual = train_stage(tmp_path / "usual", **start)
    weights = unet_of(tmp_path / "usual")
    train_stage(tmp_path / "checkpointing", **start, sd__gradient_checkpointing=True)
    assert_same_training(weights, unet_of(tmp_path / "checkpointing"))

    changes = {
        "snr": {"sd__min_snr_gamma": 1.0},
        "no_dropout": {"sd__caption_dropout": 0.0},
        "last_weights": {"sd__ema_decay": 0.0},
        "seed": {"seed": 1, "sd__skip_broken": True},
        "bf16": {"mixed_precision": "bf16"},
        "limit": {"sd__limit": 16, "sd__val_images": 3},
        "constant": {"sd__val_csv": "", "sd__lr_schedule": "constant", "sd__warmup_steps": 2},
    }
    logs = {name: train_stage(tmp_path / name, **start, **fields) for name, fields in changes.items()}
    for name, log in logs.items():
        assert any("val_loss" in entry for entry in log) == (name != "constant")
        assert not all(value.equal(weights[key]) for key, value in unet_of(tmp_path / name).items()), name
    # validation is unweighted: after the first step the weights hardly differ
    first = [next(entry["val_loss"] for entry in log if "val_loss" in entry) for log in (usual, logs["snr"])]
    assert first[0] == pytest.approx(first[1], rel=1e-2) and logs["snr"][0]["loss"] < 0.9 * usual[0]["loss"]
    assert len(LatentShards(tmp_path / "limit" / "latents" / "val")) == 3
    rates = [[entry["learning_rate"] for entry in log if "loss" in entry] for log in (usual, logs["constant"])]
    assert rates[0] == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 0.0], abs=1e-9) and rates[1] == [5e-4, 1e-3, 1e-3, 1e-3]


@pytest.mark.slow
def test_extracted_latents_take_the_place_of_images(model, world, train_stage, run_main, config_file, tmp_path):
    start = {"pretrained__model": str(model)}
    fields = start | {"dataset__data_path": str(world / "images"), "dataset__image_size": 32}
    for name in ("train", "val"):
        fields |= {"dataset__csv": str(world / SPLIT.format(name)), "logdir": str(tmp_path / f"{name}_samples")}
        run_main("extract_dataset_latents.py", config_file, **fields)
    latents, val = (str(tmp_path / f"{name}_samples" / "latents") for name in ("train", "val"))
    train_stage(tmp_path / "images", **start)
    train_stage(tmp_path / "latents", **start, sd__latents=latents, sd__csv="", sd__data_path="", sd__val_csv="",
          sd__val_latents=val)  # fmt: skip
    assert not (tmp_path / "latents" / "latents").exists()
    assert_equal(unet_of(tmp_path / "latents"), unet_of(tmp_path / "images"), **EXACT)

    def refused(message, **other):
        with pytest.raises(UserError, match=message):
            train_stage(tmp_path / "y", **start, sd__latents=latents, **other)

    refused("share images", sd__val_latents=latents)
    refused("image_size=32, .* 64", sd__image_size=64)
    shard = tmp_path / "train_samples" / "latents" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused("shard_00000.safetensors' differs from the index")
    assert not list((tmp_path / "y").glob("*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sd__csv": "/nowhere.csv"}, "/nowhere.csv"),
        ({"sd__data_path": "/nowhere"}, "/nowhere"),
        ({"sd__stage": "nope"}, "sd.stage is 'nope'.*vae, unet, finetune"),
        ({"sd__stage": "unet"}, "vae' holds no VAE"),
        ({"sd__lr_schedule": "linear"}, "sd.lr_schedule is 'linear'.*cosine, constant"),
        ({"sd__text_encoder": "t5"}, "sd.text_encoder is 't5'.*clip"),
        ({"sd__use_lora": True, "sd__stage": "vae"}, "sd.use_lora=True needs sd.stage=finetune"),
        ({"sd__caption_dropout": 1.5}, r"sd.caption_dropout is 1.5.*\[0, 1\)"),
        ({"sd__gradient_accumulation_steps": 0}, "sd.gradient_accumulation_steps is 0"),
        ({"sd__save_every": -1}, "sd.save_every is -1"),
        ({"sd__batch_size": 100, "sd__stage": "vae"}, "48 items .* 100"),
        ({"sd__vae_channels": (8, 9)}, "channels multiples of 8"),
        ({"sd__latents": "/nowhere"}, "'/nowhere' holds no complete latents"),
        ({"sd__output": ""}, "sd.output is empty"),
        ({"sd__stage": "vae", "sd__image_size": 30}, "sd.image_size is 30.* 4"),
        ({"sd__val_csv": "TRAIN"}, "phantom_train.csv' and .*phantom_train.csv'"),
        ({"sd__use_8bit_adam": True, "sd__stage": "vae"}, "use_8bit_adam=True needs bitsandbytes"),
    ],
)
def test_bad_input(fields, message, train_stage, base, tiny_pipeline_dir, tmp_path):
    fields = {key: base["sd__csv"] if value == "TRAIN" else value for key, value in fields.items()}
    with pytest.raises(UserError, match=message):
        train_stage(tmp_path / "x", **{"pretrained__model": str(tiny_pipeline_dir)} | fields)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops(model, train_stage, tmp_path):
    with pytest.raises(UserError, match="the loss is (nan|inf) at step .* sd.learning_rate"):
        train_stage(tmp_path, pretrained__model=str(model), sd__learning_rate=1e30, sd__num_steps=20)
    assert not (tmp_path / "pretrained_unet.safetensors").exists()


def weights_of(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


@pytest.mark.slow
def test_a_model_with_bert_opens_like_any_other(bert_model, run_main, config_file, tmp_path):
    pipe = load_pipeline(bert_model)
    assert has_mask(pipe.text_encoder) and pipe.tokenizer.model_max_length == 20
    fields = {"logdir": str(tmp_path), "pretrained__model": str(bert_model), "eval__num_samples_per_prompt": 1}
    fields |= {"eval__classifier": "", "sample__num_steps": 2, "mixed_precision": "no"}
    run_main("eval.py", config_file, **fields, unet_path=str(bert_model / "pretrained_unet.safetensors"))
    assert len(read_log(tmp_path)) == 4


@pytest.mark.slow
def test_bert_takes_clips_place_frozen_or_slowly_trained(model, bert_model, train_stage, tmp_path):
    start = {"pretrained__model": str(model), "sd__bert": str(bert_model), "sd__text_encoder": "bert"}
    start |= {"sd__text_tokens": 16, "sd__ema_decay": 0.0, "sd__caption_dropout": 0.0, "sd__warmup_steps": 0}
    train_stage(tmp_path / "frozen", **start)
    assert_equal(weights_of(bert_model, "text_encoder"), weights_of(tmp_path / "frozen", "text_encoder"), **EXACT)
    assert load_pipeline(tmp_path / "frozen").tokenizer.model_max_length == 16
    # Adam's first step is as long as its learning rate: a tenth of the UNet's for the text encoder
    for rate in (1e-3, 1e-4):
        folder = tmp_path / f"trained-{rate}"
        train_stage(folder, **start, sd__train_text_encoder=True, sd__num_steps=1, sd__learning_rate=rate)
        load_pipeline(folder)
        for part, source, step in (("unet", model, rate), ("text_encoder", bert_model, rate / 10)):
            old, new = weights_of(source, part), weights_of(folder, part)
            moved = max(float((old[name] - new[name]).abs().max()) for name in old)
            assert math.isclose(moved, step, rel_tol=0.05)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool as generate.py writes it: five images, of which one did not pass."""
    folder, log = tmp_path_factory.mktemp("pool"), []
    for number in range(5):
        prompt = CAPTIONS[number % 2]
        path = f"images/{folder_name(prompt)}/{number}.png"
        save_image(folder / path, torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number)))
        log.append({"prompt": prompt, "path_to_img": path, "policy": 0.2 * (number + 1), "passed": number != 3})
    write_log(folder, log)
    return folder


@pytest.mark.slow
def test_a_pool_is_mixed_with_real_images(model, pool, train_stage, tmp_path):
    start = {"pretrained__model": str(model), "sd__val_csv": "", "sd__num_steps": 2}
    log = train_stage(tmp_path / "mixed", **start, sd__pool=str(pool))
    train_stage(tmp_path / "plain", **start)
    pool_latents = LatentShards(tmp_path / "mixed" / "latents" / "pool")
    assert len(pool_latents) == 4 and pool_latents.captions == sorted(CAPTIONS[:2])
    mixed, plain = unet_of(tmp_path / "mixed"), unet_of(tmp_path / "plain")
    assert any(not torch.equal(mixed[name], plain[name]) for name in mixed)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]

    real = LatentShards(tmp_path / "mixed" / "latents" / "train")
    both = MixedLatents(real, pool_latents, [0.2, 0.4, 0.6, 1.0], 0.75)
    assert len(both) == len(real) + round(len(real) / 3)
    names = both.captions
    both.renumber(names)
    weights = torch.stack([both[position][3] for position in range(len(both))])
    assert (weights[: len(real)] == 1).all()
    expected = torch.tensor([0.2, 0.4, 0.6, 1.0]) / 0.55
    torch.testing.assert_close(weights[len(real) :], expected.repeat(9)[: len(both) - len(real)])
    assert names[both[len(real)][2]] == CAPTIONS[0] and names[both[len(real) + 1][2]] == CAPTIONS[1]
    for share, scores in ((0.4, [1, 1, 1, 1]), (0.5, [0, 0, 0, 0]), (0.5, [1, 1])):
        with pytest.raises(UserError):
            MixedLatents(real, pool_latents, scores, share)
    write_log(tmp_path / "none", [entry | {"passed": False} for entry in read_log(pool)])
    with pytest.raises(UserError, match="no image that the Selector passed"):
        train_stage(tmp_path / "out", **start, sd__pool=str(tmp_path / "none"))


def test_ambiguous_fundus_images_are_named(tiny_pipeline_dir, train_stage, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGBA", (32, 32), (90, 0, 0, 128)).save(tmp_path / "images" / "glass.png")
    (tmp_path / "t.csv").write_text("path,Text,modality\nimages/glass.png,drusen,Fundus\n")
    fields = {"pretrained__model": str(tiny_pipeline_dir), "sd__kind": "fundus", "sd__csv": str(tmp_path / "t.csv")}
    with pytest.raises(UserError, match="glass.png"):
        train_stage(tmp_path / "out", **fields, sd__val_csv="", sd__data_path=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet", "finetune"])
def test_a_stopped_training_resumes_to_the_same_end(stage, model, base, train_stage, tmp_path, monkeypatch):
    fields = {"sd__stage": stage, "sd__num_steps": 5, "sd__save_every": 2, "sd__gradient_accumulation_steps": 2}
    fields["pretrained__model"] = str(model)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    if stage == "unet":
        for folder in (whole, stopped):
            shutil.copytree(model / "vae", folder / "vae")
    expected = train_stage(whole, **fields)
    snapshot = Training.snapshot

    def stop(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return snapshot(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "snapshot", stop)
        train_stage(stopped, **fields)
    assert len(entries(stopped / f"{stage}.jsonl")) > 4  # steps 3 and 4 will be repeated
    with pytest.raises(UserError, match="sd.learning_rate=0.001, now it is 0.1"):
        train_stage(stopped, **fields, sd__learning_rate=0.1)
    if stage == "vae":
        with pytest.raises(UserError, match="with images="):
            train_stage(stopped, **fields, sd__csv=base["sd__val_csv"], sd__val_csv="")
    log = train_stage(stopped, **fields)
    for key in ("step", "loss", "val_loss"):
        assert [entry.get(key) for entry in log] == [entry.get(key) for entry in expected]
    names = ["vae/diffusion_pytorch_model.safetensors"] if stage == "vae" else ["pretrained_unet.safetensors"]
    names += ["text_encoder/model.safetensors"] * (stage == "unet")
    for name in names:
        assert_equal(load_file(stopped / name), load_file(whole / name), **EXACT)
    assert not list(stopped.glob("*_state.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [b"torn", {"step": "1"}, {"parameters": []}, {"optimizer": []}, {"average": 3}], ids=str
)
def test_a_damaged_state_is_refused(train_stage, tmp_path, monkeypatch, change):
    def stop(path, state, belongs_to):
        save_state(path, dict(state) | change, belongs_to)
        raise KeyboardInterrupt

    fields = {"sd__stage": "vae", "sd__save_every": 1, "sd__num_steps": 2}
    if isinstance(change, bytes):
        (tmp_path / "vae_state.pt").write_bytes(change)
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("ddpo_pytorch.utils.training_state.save_state", stop)
            train_stage(tmp_path, **fields)
    with pytest.raises(UserError, match="vae_state.pt'") as caught:
        train_stage(tmp_path, **fields)
    assert "\n" not in str(caught.value)


def test_a_state_left_by_a_kill_after_the_end_is_removed(train_stage, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae_state.pt").write_bytes(b"state")
    with pytest.raises(UserError, match="vae' exists already"):
        train_stage(tmp_path, sd__stage="vae")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


# a setting, another value, and the stages whose result depends on it
USED = [
    ("vae_kl_weight", 1.0, {"vae"}),
    ("vae_channels", (8, 8), {"vae"}),
    ("text_width", 8, {"unet"}),
    ("caption_dropout", 0.5, {"unet", "finetune"}),
    ("text_encoder", "bert", {"unet", "finetune"}),
    ("use_lora", True, {"finetune"}),
    ("real_share", 0.9, {"finetune"}),
    ("lora_rank", 9, set()),  # without use_lora
    ("text_tokens", 9, set()),  # without BERT
    ("learning_rate", 1.0, {"vae", "unet", "finetune"}),
]
PLACES = dict.fromkeys(("output", "data_path", "csv", "val_csv", "latents", "val_latents", "cache_dir"), "elsewhere")


@pytest.mark.parametrize("stage", ["vae", "unet", "finetune"])
def test_only_settings_that_the_result_depends_on_are_compared(stage):
    """Neither paths, as of a folder that was copied, nor settings of other stages."""
    config = load_module(ROOT / "config" / "base.py").get_config()
    config.sd.stage, config.sd.pool, config.sd.bert = stage, "pool", "bert"

    def changed(fields):
        other = config.copy_and_resolve_references()
        other.sd.update(fields)
        return settings_of(other, 1, {}) != settings_of(config, 1, {})

    assert not changed(PLACES | {"vae": "", "bert": ""})
    for name, value, stages in USED:
        assert changed({name: value}) is (stage in stages), name


@pytest.mark.slow
def test_two_processes_equal_one(model, train_stage, base, config_file, tmp_path):
    fields = {"pretrained__model": str(model), "sd__gradient_accumulation_steps": 2}
    one = train_stage(tmp_path / "one", **fields)
    fields = base | fields | {"sd__output": tmp_path / "two", "sd__batch_size": 4}
    succeed("train_sd.py", *options(config_file, **fields), processes=2)
    for first, second in zip(one, entries(tmp_path / "two" / "finetune.jsonl"), strict=True):
        for key in ("loss", "val_loss"):
            assert first.get(key, 0) == pytest.approx(second.get(key, 0), rel=1e-5)
    assert_same_training(unet_of(tmp_path / "one"), unet_of(tmp_path / "two"))
    shards = [load_file(tmp_path / name / "latents/train/shard_00000.safetensors") for name in ("one", "two")]
    assert_equal(*shards, **EXACT)
