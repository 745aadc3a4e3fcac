"""LoRA adapters: how they start, that they can be switched off, and every file format that may hold them."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_unet import RANK, TARGETS, legacy, make_unet, projections, random_weights, randomize, run, run_by_hand

from ddpo_pytorch.generator import lora
from ddpo_pytorch.generator.lora import add_lora, load_lora, lora_parameters, lora_state_dict, merged_state_dict

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = random_weights(make_unet())  # <module>.{down,up}
MODULES = tuple(projections(make_unet()))


def test_new_adapters_change_nothing_and_follow_the_seed_and_mistakes_are_refused():
    unet, again, other, half = make_unet(), make_unet(), make_unet(), make_unet().half()
    base = run(unet)
    for rank, targets, message in ((0, TARGETS, "rank is 0"), (RANK, ("to_q", "norm1"), "'norm1'"), (RANK, (), "''")):
        refused(message, add_lora, unet, rank, targets, seed=0)
        assert not lora.has_lora(unet)
    for model, seed in ((unet, 3), (again, 3), (other, 4), (half, 3)):
        add_lora(model, RANK, TARGETS, seed)
    refused("already", add_lora, unet, RANK, TARGETS, seed=0)
    assert torch.equal(run(unet), base)
    first, second, third, fourth = map(lora_state_dict, (unet, again, other, half))
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], fourth[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    assert len(first) == 2 * len(projections(make_unet()))
    down = torch.cat([value.flatten() for key, value in first.items() if "lora_A" in key])
    assert down.std().item() == pytest.approx(1 / RANK, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(half))
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(first) and all(".lora_" in name for name in trainable)


def test_disabled_lora_is_the_base_model():
    unet = make_unet()
    base = run(unet)
    add_lora(unet, RANK, TARGETS, seed=0)
    randomize(unet)
    adapted = run(unet)
    assert (adapted - base).abs().max() > 0.01
    frozen = lora_parameters(unet)[0].requires_grad_(False)
    # a KL term runs the base model between the policy's forward and backward pass
    loss = unet(torch.ones(1, 4, 8, 8), 5, encoder_hidden_states=torch.ones(1, 5, 12)).sample.square().mean()
    with pytest.raises(RuntimeError, match="inside"), lora.disabled_lora(unet):
        assert torch.equal(run(unet), base)
        raise RuntimeError("inside")
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in lora_parameters(unet))
    assert torch.equal(run(unet), adapted)
    assert not frozen.requires_grad and all(parameter.requires_grad for parameter in lora_parameters(unet)[1:])


def test_adapters_in_half_precision_compute_as_under_autocast():
    unet, inputs = make_unet().bfloat16(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    add_lora(unet, RANK, ("to_q", "conv1"), seed=0)
    randomize(unet)
    linear = next(layer for name, layer in unet.named_modules() if name.endswith("attn1.to_q"))
    conv = next(layer for name, layer in unet.named_modules() if name.endswith("conv1"))
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(inputs), conv(x)
    lora.cast_adapters(unet)
    for one, other in zip((linear(inputs), conv(x)), expected, strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)
    assert {weight.dtype for weight in lora_parameters(unet)} == {torch.float32}


def test_a_scale_interpolates_between_the_base_model_and_the_trained_one():
    unet, weights = make_unet(), {}
    refused("eval.lora_scale is 0.5", lora.scale_lora, unet, 0.5)
    weights[0.0] = merged_state_dict(unet)
    add_lora(unet, RANK, TARGETS, seed=0)
    randomize(unet)
    weights[1.0] = merged_state_dict(unet)
    for scale, total in ((0.5, 0.5), (0.5, 0.25), (0.0, 0.0)):
        lora.scale_lora(unet, scale)
        expected = {name: weights[0.0][name].lerp(weights[1.0][name], total) for name in weights[0.0]}
        torch.testing.assert_close(merged_state_dict(unet), expected, **CLOSE)


def test_adapters_of_any_layer_are_saved_loaded_also_by_diffusers_and_merged(tmp_path):
    unet, other, theirs, merged = (make_unet() for _ in range(4))
    add_lora(unet, 2, ("to_q", "conv1", "proj_in"), seed=0)
    assert all(value.equal(other.state_dict()[name]) for name, value in merged_state_dict(unet).items())
    randomize(unet)
    file = lora.save_lora(unet, tmp_path / "run")
    assert sorted(load_file(file)) == sorted(lora_state_dict(unet))
    load_lora(other, tmp_path / "run")
    assert torch.equal(run(other), run(unet)) and (run(unet) - run(merged)).abs().max() > 0.01
    theirs.load_lora_adapter(file.parent, prefix="unet", weight_name=file.name)
    torch.testing.assert_close(run(theirs), run(unet), **CLOSE)
    merged.load_state_dict(merged_state_dict(unet))
    torch.testing.assert_close(run(merged), run(unet), **CLOSE)
    lora.merge_lora(unet)
    assert not lora.has_lora(unet) and torch.equal(run(unet), run(merged))


def named(down: str, up: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights as <prefix><module>.<down or up>.weight."""
    halves = itertools.product(MODULES, (("down", down), ("up", up)))
    return {f"{prefix}{module}.{name}.weight": WEIGHTS[f"{module}.{half}"] for module, (half, name) in halves}


def kohya(alpha: float = RANK) -> dict[str, torch.Tensor]:
    """Names of kohya's scripts, with an alpha for each module."""
    tensors = {}
    for module in MODULES:
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_{half}.weight": WEIGHTS[f"{module}.{half}"] for half in ("down", "up")}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


FORMATS = {
    "trained.safetensors": named("lora.down", "lora.up", "unet."),  # diffusers' training scripts
    "kohya.safetensors": kohya(),
    "legacy_prefixed.safetensors": legacy(WEIGHTS, "unet."),
    "pytorch_lora_weights.bin": legacy(WEIGHTS),  # as in the published folder
    "peft.safetensors": named("lora_A", "lora_B", "base_model.model."),
    "peft_named.bin": named("lora_A.policy", "lora_B.policy", "base_model.model.unet."),
    "diffusers.safetensors": named("lora_A", "lora_B", "unet."),
}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (torch.save if file.suffix == ".bin" else save_file)(tensors, file)
    return file


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_w_x_plus_up_down_x(tmp_path, name):
    new, existing = make_unet(), make_unet()
    add_lora(existing, RANK, TARGETS, seed=5)
    file, base, expected = write(tmp_path / name, FORMATS[name]), run(new), run_by_hand(WEIGHTS)
    assert (expected - base).abs().max() > 0.01
    for unet in (new, existing):
        load_lora(unet, tmp_path if name == "pytorch_lora_weights.bin" else file)
        torch.testing.assert_close(run(unet), expected, **CLOSE)


def test_scales_stated_by_peft_diffusers_and_kohya(tmp_path):
    folder, unet = tmp_path / "peft", make_unet()
    folder.mkdir()
    write(folder / "adapter_model.safetensors", FORMATS["peft.safetensors"])
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 10, "use_rslora": True}))
    load_lora(unet, folder)
    torch.testing.assert_close(run(unet), run_by_hand(WEIGHTS, 5.0), **CLOSE)
    (folder / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    refused("use_dora", load_lora, make_unet(), folder)

    theirs = make_unet()
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=list(TARGETS), init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path / "bare")
    layers = {key.removeprefix("unet."): value for key, value in lora_state_dict(theirs).items()}
    metadata = {"unet_lora_adapter_metadata": theirs.peft_config["default"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "full", unet_lora_layers=layers, **metadata)
    for place in ("full", "bare"):
        load_lora(unet, tmp_path / place)
        torch.testing.assert_close(run(unet), run(theirs), **CLOSE)

    eight = {key: value.to(torch.float8_e4m3fn) for key, value in legacy(WEIGHTS).items()}
    load_lora(unet, write(tmp_path / "eight.safetensors", eight))
    rounded = {key: value.to(torch.float8_e4m3fn).float() for key, value in WEIGHTS.items()}
    torch.testing.assert_close(run(unet), run_by_hand(rounded, 1.0), **CLOSE)

    mixed = kohya(RANK / 2)  # each module has its own
    first = next(name for name in mixed if name.endswith(".alpha"))
    mixed[first] = mixed[first] / 2
    load_lora(unet, write(tmp_path / "mixed.safetensors", mixed))
    key = f"{MODULES[0]}.up"
    torch.testing.assert_close(run(unet), run_by_hand(WEIGHTS | {key: WEIGHTS[key] / 2}, 0.5), **CLOSE)


FIRST = next(iter(legacy(WEIGHTS)))
CUT = {key: value for key, value in WEIGHTS.items() if not key.startswith(MODULES[0])}
UNFIT = {  # tensors, targets of adapters that the UNet has already, and words of the error
    "shape": (legacy(WEIGHTS) | {FIRST: torch.zeros(RANK, 99)}, None, r"to_q_lora\.down\.weight .*4, 99\), .*\(4, 8\)"),
    "rank": (legacy(random_weights(make_unet(), rank=8)), TARGETS, r"shape \(8, \d+\), .* \(4, \d+\)"),
    "half": ({key: value for key, value in legacy(WEIGHTS).items() if key != FIRST}, None, r"lacks .*to_q\.lora_A"),
    "attention cut": (legacy(CUT), None, r"lacks .*attn.*\.lora_A\.weight"),
    "module": (legacy(WEIGHTS) | {"nowhere.attn1.processor.to_q_lora.down.weight": torch.zeros(4, 8)}, None, "nowhere"),
    "targets": (legacy(WEIGHTS), ("to_q",), "which the model lacks"),
    "format": (legacy(WEIGHTS) | {"text_model.encoder.weight": torch.zeros(1)}, TARGETS, r"text_model\.encoder"),
    "twice": (legacy(WEIGHTS) | {f"unet.{FIRST}": torch.zeros(1)}, None, f"unet.{FIRST}"),
    "text encoder": ({"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 4)}, None, "text_encoder"),
    "kohya's text encoder": ({"lora_te_text_mlp_fc1.lora_down.weight": torch.zeros(4, 4)}, None, "lora_te_"),
    "alpha": (kohya() | {"lora_unet_nowhere.alpha": torch.ones(1)}, None, "nowhere"),
    "dora": (kohya() | {f"lora_unet_{MODULES[0].replace('.', '_')}.dora_scale": torch.ones(1)}, None, "dora_scale"),
    "nothing": ({}, None, "no adapter"),
}


@pytest.mark.parametrize(("tensors", "present", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_files_fail_by_name_and_change_nothing(tmp_path, tensors, present, message):
    unet, file = make_unet(), write(tmp_path / "bad.bin", tensors)
    if present:
        add_lora(unet, RANK, present, seed=0)
    before = run(unet)
    assert str(file) in refused(message, load_lora, unet, file)
    assert lora.has_lora(unet) == bool(present) and torch.equal(run(unet), before)
