"""LoRA files: every format that may hold adapters gives W x + up(down(x)); every other file is refused by name."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_unet import RANK, TARGETS, make_unet, random_weights, randomize, run, run_by_hand

from ddpo_pytorch.generator.lora import (
    add_lora,
    has_lora,
    load_lora,
    lora_state_dict,
    save_lora,
)
from ddpo_pytorch.utils.errors import UserError


def legacy(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Names of diffusers < 0.22, as in the published checkpoint."""
    renamed = {}
    for key, value in weights.items():
        module, half = key.rsplit(".", 1)
        attention, projection = module.replace(".to_out.0", ".to_out").rsplit(".", 1)
        renamed[f"{prefix}{attention}.processor.{projection}_lora.{half}.weight"] = value
    return renamed


def peft(weights: dict[str, torch.Tensor], prefix: str, adapter: str = "") -> dict[str, torch.Tensor]:
    """peft's names; diffusers' are the same with prefix "unet."."""
    halves = {"down": "lora_A", "up": "lora_B"}
    renamed = {}
    for key, value in weights.items():
        module, half = key.rsplit(".", 1)
        renamed[f"{prefix}{module}.{halves[half]}{adapter}.weight"] = value
    return renamed


def trained(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Names of diffusers' training scripts."""
    return {
        f"{prefix}{key.replace('.down', '.lora.down').replace('.up', '.lora.up')}.weight": w
        for key, w in weights.items()
    }


def kohya(weights: dict[str, torch.Tensor], alpha: float = RANK) -> dict[str, torch.Tensor]:
    """Names of kohya's scripts, with an alpha for each module."""
    renamed = {}
    for key, value in weights.items():
        module, half = key.rsplit(".", 1)
        name = f"lora_unet_{module.replace('.', '_')}"
        renamed[f"{name}.lora_{half}.weight"] = value
        renamed[f"{name}.alpha"] = torch.tensor(float(alpha))
    return renamed


FORMATS = {
    "trained.safetensors": lambda w: trained(w, "unet."),
    "trained_bare.safetensors": lambda w: trained(w, ""),
    "trained.bin": lambda w: trained(w, "unet."),
    "kohya.safetensors": lambda w: kohya(w),
    "kohya.bin": lambda w: kohya(w),
    "legacy.bin": lambda w: legacy(w),
    "legacy_prefixed.bin": lambda w: legacy(w, "unet."),
    "legacy.safetensors": lambda w: legacy(w),
    "legacy_prefixed.safetensors": lambda w: legacy(w, "unet."),
    "peft.safetensors": lambda w: peft(w, "base_model.model."),
    "peft_named.bin": lambda w: peft(w, "base_model.model.", ".default"),
    "peft_other_name.safetensors": lambda w: peft(w, "base_model.model.", ".policy"),
    "peft_unet.safetensors": lambda w: peft(w, "base_model.model.unet."),
    "diffusers.safetensors": lambda w: peft(w, "unet."),
    "bare.safetensors": lambda w: peft(w, ""),
}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return file


@pytest.mark.parametrize("present", [False, True], ids=["new", "into_existing"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_w_x_plus_up_down_x(tmp_path, name, present):
    unet = make_unet()
    weights = random_weights(unet)
    file = write(tmp_path / name, FORMATS[name](weights))
    base = run(unet)
    if present:
        add_lora(unet, RANK, TARGETS, seed=5)
    load_lora(unet, file)
    expected = run_by_hand(weights)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(run(unet), expected, rtol=1e-5, atol=1e-5)


def test_published_folder_is_read(tmp_path):
    """An accelerate state folder: the LoRA file among others, found by its name."""
    unet = make_unet()
    weights = random_weights(unet)
    write(tmp_path / "pytorch_lora_weights.bin", legacy(weights))
    (tmp_path / "scheduler.bin").write_bytes(b"")
    load_lora(unet, tmp_path)
    torch.testing.assert_close(run(unet), run_by_hand(weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["folder/run", "weights.safetensors"])
def test_save_and_load_is_a_round_trip(tmp_path, target):
    unet = make_unet()
    load_lora(unet, write(tmp_path / "a.safetensors", FORMATS["legacy.safetensors"](random_weights(unet))))
    file = save_lora(unet, tmp_path / target)
    assert file.suffix == ".safetensors"
    assert sorted(load_file(file)) == sorted(lora_state_dict(unet))
    assert not list(file.parent.glob("*.partial"))
    other = make_unet()
    load_lora(other, tmp_path / target)
    assert torch.equal(run(other), run(unet))
    restored, saved = lora_state_dict(other), lora_state_dict(unet)
    assert all(torch.equal(restored[key], saved[key]) for key in saved)


def test_diffusers_opens_our_file(tmp_path, tiny_pipeline_dir):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    add_lora(pipe.unet, RANK, TARGETS, seed=0)
    randomize(pipe.unet)
    save_lora(pipe.unet, tmp_path)
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, channels, side, side, generator=generator)
    text = torch.randn(1, 7, pipe.unet.config.cross_attention_dim, generator=generator)

    theirs = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    with torch.no_grad():
        base = theirs.unet(sample, 300, encoder_hidden_states=text).sample
        theirs.load_lora_weights(tmp_path)
        expected = theirs.unet(sample, 300, encoder_hidden_states=text).sample
        ours = pipe.unet(sample, 300, encoder_hidden_states=text).sample
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_scale_stated_in_a_peft_folder(tmp_path):
    unet = make_unet()
    weights = random_weights(unet)
    write(tmp_path / "adapter_model.safetensors", peft(weights, "base_model.model."))
    for config, scale in (
        ({"r": RANK, "lora_alpha": 10}, 2.5),
        ({"r": RANK, "lora_alpha": 10, "use_rslora": True}, 5.0),
        ({"r": RANK, "lora_alpha": RANK}, 1.0),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        unet = make_unet()
        load_lora(unet, tmp_path)
        torch.testing.assert_close(run(unet), run_by_hand(weights, scale), rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 1, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_lora(make_unet(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{torn")
    with pytest.raises(UserError, match="no readable adapter configuration"):
        load_lora(make_unet(), tmp_path)


def test_a_cut_attention_processor_file_is_refused(tmp_path):
    """Half a file would be taken for the published checkpoint; peft's may adapt some layers only."""
    weights = random_weights(make_unet())
    cut = {key: value for key, value in weights.items() if not key.startswith(next(iter(weights)).rsplit(".", 1)[0])}
    assert 0 < len(cut) == len(weights) - 2
    with pytest.raises(UserError, match=r"lacks .*attn.*\.lora_A\.weight"):
        load_lora(make_unet(), write(tmp_path / "cut.bin", legacy(cut)))
    load_lora(make_unet(), write(tmp_path / "cut.safetensors", peft(cut, "unet.")))


def test_scale_stated_by_diffusers(tmp_path):
    theirs = make_unet()
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=list(TARGETS), init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path / "bare")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "full",
        unet_lora_layers={key.removeprefix("unet."): value for key, value in lora_state_dict(theirs).items()},
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    expected = run(theirs)
    for folder in ("full", "bare"):
        ours = make_unet()
        load_lora(ours, tmp_path / folder)
        torch.testing.assert_close(run(ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("converted", [True, False], ids=["diffusers_names", "peft_names"])
def test_adapters_saved_as_diffusers_training_scripts_do(tmp_path, converted, safe):
    """As in train_text_to_image_lora.py: `save_lora_weights` of what peft gives, in diffusers' names or not."""
    theirs = make_unet()
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights=False))
    layers = get_peft_model_state_dict(theirs)
    layers = convert_state_dict_to_diffusers(layers) if converted else layers
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, safe_serialization=safe)
    ours = make_unet()
    load_lora(ours, tmp_path)
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("converted", [True, False], ids=["diffusers_names", "peft_names"])
def test_an_adapter_of_the_text_encoder_is_refused_by_name(tmp_path, converted):
    theirs = make_unet()
    theirs.add_adapter(LoraConfig(r=RANK, target_modules=list(TARGETS), init_lora_weights=False))
    text = {f"text_model.encoder.layers.0.self_attn.q_proj.lora_{half}.weight": torch.rand(4, 4) for half in "AB"}
    change = convert_state_dict_to_diffusers if converted else dict
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=change(get_peft_model_state_dict(theirs)),
        text_encoder_lora_layers=change(text),
    )
    kohyas = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 4)}
    for place in (tmp_path, write(tmp_path / "kohya.safetensors", kohyas)):
        with pytest.raises(UserError, match="text_encoder|lora_te_") as caught:
            load_lora(make_unet(), place)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_each_module_has_its_own_alpha_in_kohyas_files(tmp_path):
    weights = random_weights(make_unet())
    unet = make_unet()
    load_lora(unet, write(tmp_path / "half.safetensors", kohya(weights, RANK / 2)))
    torch.testing.assert_close(run(unet), run_by_hand(weights, 0.5), rtol=1e-5, atol=1e-5)
    mixed = kohya(weights)
    first = next(name for name in mixed if name.endswith(".alpha"))
    mixed[first] = mixed[first] / 2
    load_lora(unet, write(tmp_path / "mixed.safetensors", mixed))
    halved = {
        key: value / 2 if key == next(iter(weights)).replace(".down", ".up") else value
        for key, value in weights.items()
    }
    torch.testing.assert_close(run(unet), run_by_hand(halved), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("lora_unet_nowhere_attn1_to_q.lora_down.weight", "nowhere"),
        ("lora_unet_nowhere.alpha", "nowhere"),
        ("lora_unet_{}.dora_scale", "dora_scale"),
        ("lora_unet_{}.hada_w1_a", "hada_w1_a"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, extra, named):
    weights = random_weights(make_unet())
    module = next(iter(weights)).rsplit(".", 1)[0].replace(".", "_")
    tensors = kohya(weights) | {extra.format(module): torch.ones(1)}
    with pytest.raises(UserError, match=named):
        load_lora(make_unet(), write(tmp_path / "other.safetensors", tensors))


def test_convolutions_can_be_targets(tmp_path):
    unet = make_unet()
    add_lora(unet, 2, ("conv1", "proj_in"), seed=0)
    randomize(unet)
    save_lora(unet, tmp_path)
    other = make_unet()
    load_lora(other, tmp_path)
    assert torch.equal(run(other), run(unet))


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """A legacy file with one thing wrong, at its first key."""
    tensors = legacy(weights)
    first = next(iter(tensors))
    if how == "shape":
        tensors[first] = torch.zeros(RANK, 99)
    elif how == "missing":
        del tensors[first]
    elif how == "unknown module":
        tensors["nowhere.attn1.processor.to_q_lora.down.weight"] = tensors[first]
    elif how == "unknown format":
        tensors["text_model.encoder.weight"] = tensors[first]
    elif how == "twice":
        tensors[f"unet.{first}"] = tensors[first]
    return tensors


@pytest.mark.parametrize("present", [False, True], ids=["new", "into_existing"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"to_q_lora\.down\.weight has shape \(4, 99\), the UNet's adapter wants \(4, 8\)"),
        ("missing", r"lacks .*\.to_q\.lora_A\.weight"),
        ("unknown module", r"nowhere\.attn1\.processor\.to_q_lora\.down\.weight"),
        ("unknown format", r"text_model\.encoder\.weight is no LoRA weight"),
        ("twice", "are the same weight"),
    ],
)
def test_unfit_files_fail_by_name_and_change_nothing(tmp_path, how, message, present):
    unet = make_unet()
    file = write(tmp_path / "bad.bin", broken(random_weights(unet), how))
    if present:
        add_lora(unet, RANK, TARGETS, seed=0)
    before = run(unet)
    with pytest.raises(UserError, match=message) as error:
        load_lora(unet, file)
    assert "\n" not in str(error.value)
    assert has_lora(unet) == present
    assert torch.equal(run(unet), before)


def test_wrong_rank_names_both_shapes(tmp_path):
    unet = make_unet()
    file = write(tmp_path / "rank8.safetensors", legacy(random_weights(unet, rank=8)))
    add_lora(unet, RANK, TARGETS, seed=0)
    with pytest.raises(UserError, match=r"shape \(8, \d+\), the UNet's adapter wants \(4, \d+\)"):
        load_lora(unet, file)
    unet = make_unet()
    large = {key: value for key, value in random_weights(unet, rank=8).items() if key.startswith("mid_block")}
    mixed = random_weights(unet) | large
    with pytest.raises(UserError, match=r"mid_block.* has shape \(8, \d+\), the UNet's adapter wants \(4, \d+\)"):
        load_lora(unet, write(tmp_path / "mixed.safetensors", legacy(mixed)))


def test_adapters_of_other_targets_are_refused(tmp_path):
    unet = make_unet()
    file = write(tmp_path / "all.safetensors", legacy(random_weights(unet)))
    add_lora(unet, RANK, ("to_q",), seed=0)
    with pytest.raises(UserError, match="belongs to no adapter of the UNet"):
        load_lora(unet, file)


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_malicious_pickle_is_not_run(tmp_path):
    victim = tmp_path / "victim"
    for file in (tmp_path / "torch.bin", tmp_path / "plain.bin"):
        if file.name == "torch.bin":
            torch.save({"a": Malicious(victim)}, file)
        else:
            file.write_bytes(pickle.dumps({"a": Malicious(victim)}, protocol=2))
        with pytest.raises(UserError, match=str(file)):
            load_lora(make_unet(), file)
        assert not victim.exists()


def test_files_that_are_not_weights(tmp_path):
    unet = make_unet()
    with pytest.raises(UserError, match="no LoRA weights at"):
        load_lora(unet, tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"must hold one of pytorch_lora_weights\.safetensors"):
        load_lora(unet, tmp_path)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_lora(unet, garbage)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match="empty.bin.* is empty"):
        load_lora(unet, tmp_path / "empty.bin")
    torch.save({"epoch": 3, "weights": torch.zeros(2)}, tmp_path / "mixed.bin")
    with pytest.raises(UserError, match="other things than tensors"):
        load_lora(unet, tmp_path / "mixed.bin")
    with pytest.raises(UserError, match="is empty"):
        load_lora(unet, write(tmp_path / "nothing.safetensors", {}))
