"""LoRA adapters: how they start, that they can be switched off, and every file format that may hold them."""

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
from tiny_unet import RANK, TARGETS, legacy, make_unet, projections, random_weights, randomize, run, run_by_hand, split

from ddpo_pytorch.generator.lora import (
    add_lora,
    disabled_lora,
    has_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    save_lora,
)
from ddpo_pytorch.utils.errors import UserError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_new_adapters_change_nothing_and_follow_the_seed():
    unet, again, other, half = make_unet(), make_unet(), make_unet(), make_unet().half()
    base = run(unet)
    for model, seed in ((unet, 3), (again, 3), (other, 4), (half, 3)):
        add_lora(model, RANK, TARGETS, seed)
    assert torch.equal(run(unet), base)
    first, second, third = lora_state_dict(unet), lora_state_dict(again), lora_state_dict(other)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    assert all(torch.equal(first[key], value) for key, value in lora_state_dict(half).items())
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
    with disabled_lora(unet):
        assert torch.equal(run(unet), base)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in lora_parameters(unet))
    assert torch.equal(run(unet), adapted)
    assert not frozen.requires_grad and all(parameter.requires_grad for parameter in lora_parameters(unet)[1:])
    with pytest.raises(RuntimeError, match="inside"), disabled_lora(unet):
        raise RuntimeError("inside")
    assert torch.equal(run(unet), adapted)


def test_add_lora_refuses_mistakes():
    unet = make_unet()
    for rank, targets, message in (
        (0, TARGETS, "rank is 0"),
        (RANK, ("to_q", "to_x"), "'to_x'"),
        (RANK, ("to_q", "norm1"), "'norm1'"),
        (RANK, (), "targets are empty"),
    ):
        with pytest.raises(UserError, match=message):
            add_lora(unet, rank, targets, seed=0)
    assert not has_lora(unet)
    add_lora(unet, RANK, TARGETS, seed=0)
    with pytest.raises(UserError, match="already"):
        add_lora(unet, RANK, TARGETS, seed=0)


def test_convolutions_can_be_targets(tmp_path):
    unet = make_unet()
    add_lora(unet, 2, ("conv1", "proj_in"), seed=0)
    randomize(unet)
    save_lora(unet, tmp_path)
    other = make_unet()
    load_lora(other, tmp_path)
    assert torch.equal(run(other), run(unet))


def peft(weights: dict[str, torch.Tensor], prefix: str, adapter: str = "") -> dict[str, torch.Tensor]:
    """peft's names; diffusers' are the same with prefix "unet."."""
    halves = {"down": "lora_A", "up": "lora_B"}
    return {f"{prefix}{split(key)[0]}.{halves[split(key)[1]]}{adapter}.weight": w for key, w in weights.items()}


def trained(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Names of diffusers' training scripts."""
    return {f"{prefix}{split(key)[0]}.lora.{split(key)[1]}.weight": w for key, w in weights.items()}


def kohya(weights: dict[str, torch.Tensor], alpha: float = RANK) -> dict[str, torch.Tensor]:
    """Names of kohya's scripts, with an alpha for each module."""
    renamed = {}
    for key, value in weights.items():
        module, half = split(key)
        name = f"lora_unet_{module.replace('.', '_')}"
        renamed |= {f"{name}.lora_{half}.weight": value, f"{name}.alpha": torch.tensor(float(alpha))}
    return renamed


FORMATS = {
    "trained.safetensors": lambda w: trained(w, "unet."),
    "trained_bare.bin": lambda w: trained(w, ""),
    "kohya.safetensors": kohya,
    "legacy_prefixed.safetensors": lambda w: legacy(w, "unet."),
    "pytorch_lora_weights.bin": legacy,  # as in the published folder
    "peft.safetensors": lambda w: peft(w, "base_model.model."),
    "peft_named.bin": lambda w: peft(w, "base_model.model.", ".default"),
    "peft_other_name.safetensors": lambda w: peft(w, "base_model.model.unet.", ".policy"),
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
    load_lora(unet, tmp_path if name == "pytorch_lora_weights.bin" else file)
    expected = run_by_hand(weights)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(run(unet), expected, **CLOSE)


def test_save_and_load_is_a_round_trip(tmp_path):
    unet, other = make_unet(), make_unet()
    add_lora(unet, RANK, TARGETS, seed=0)
    randomize(unet)
    file = save_lora(unet, tmp_path / "run")
    assert sorted(load_file(file)) == sorted(lora_state_dict(unet))
    load_lora(other, tmp_path / "run")
    assert torch.equal(run(other), run(unet))
    restored, saved = lora_state_dict(other), lora_state_dict(unet)
    assert all(torch.equal(restored[key], saved[key]) for key in saved)


def test_diffusers_opens_our_file(tmp_path, tiny_pipeline_dir):
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None) for _ in range(2))
    add_lora(ours.unet, RANK, TARGETS, seed=0)
    randomize(ours.unet)
    save_lora(ours.unet, tmp_path)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16, generator=generator), 300, torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        base = theirs.unet(*inputs).sample
        theirs.load_lora_weights(tmp_path)
        expected, adapted = theirs.unet(*inputs).sample, ours.unet(*inputs).sample
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, **CLOSE)


def test_scale_stated_in_a_peft_folder(tmp_path):
    weights = random_weights(make_unet())
    write(tmp_path / "adapter_model.safetensors", peft(weights, "base_model.model."))
    config = tmp_path / "adapter_config.json"
    for stated, scale in (({"lora_alpha": 10}, 2.5), ({"lora_alpha": 10, "use_rslora": True}, 5.0)):
        config.write_text(json.dumps({"r": RANK} | stated))
        unet = make_unet()
        load_lora(unet, tmp_path)
        torch.testing.assert_close(run(unet), run_by_hand(weights, scale), **CLOSE)
    for text, message in ((json.dumps({"use_dora": True}), "use_dora"), ("{torn", "adapter_config.json")):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
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
        torch.testing.assert_close(run(ours), expected, **CLOSE)


@pytest.mark.parametrize(("converted", "safe"), [(True, True), (False, False)])
def test_adapters_saved_as_diffusers_training_scripts_do(tmp_path, converted, safe):
    """As in train_text_to_image_lora.py: `save_lora_weights` of peft's state, in diffusers' names or not."""
    theirs, ours = make_unet(), make_unet()
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights=False))
    layers = get_peft_model_state_dict(theirs)
    layers = convert_state_dict_to_diffusers(layers) if converted else layers
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, safe_serialization=safe)
    load_lora(ours, tmp_path)
    torch.testing.assert_close(run(ours), run(theirs), **CLOSE)


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
    torch.testing.assert_close(run(unet), run_by_hand(weights, 0.5), **CLOSE)
    mixed = kohya(weights)
    first = next(name for name in mixed if name.endswith(".alpha"))
    mixed[first] = mixed[first] / 2
    load_lora(unet, write(tmp_path / "mixed.safetensors", mixed))
    halved = {
        key: value / 2 if key == next(iter(weights)).replace(".down", ".up") else value
        for key, value in weights.items()
    }
    torch.testing.assert_close(run(unet), run_by_hand(halved), **CLOSE)


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


FIRST = next(iter(legacy(random_weights(make_unet()))))
UNFIT = {
    "shape": (lambda w: w | {FIRST: torch.zeros(RANK, 99)}, r"to_q_lora\.down\.weight .*\(4, 99\), .* \(4, 8\)"),
    "missing": (lambda w: {key: value for key, value in w.items() if key != FIRST}, r"lacks .*\.to_q\.lora_A\.weight"),
    "module": (lambda w: w | {"nowhere.attn1.processor.to_q_lora.down.weight": w[FIRST]}, r"nowhere\.attn1\.processor"),
    "format": (lambda w: w | {"text_model.encoder.weight": w[FIRST]}, r"text_model\.encoder\.weight"),
    "twice": (lambda w: w | {f"unet.{FIRST}": w[FIRST]}, f"unet.{FIRST}"),
}


@pytest.mark.parametrize(
    ("how", "present"), [*((how, present) for how in UNFIT for present in (None, TARGETS)), ("targets", ("to_q",))]
)
def test_unfit_files_fail_by_name_and_change_nothing(tmp_path, how, present):
    change, message = UNFIT.get(how, (dict, "belongs to no adapter"))
    unet = make_unet()
    file = write(tmp_path / "bad.bin", change(legacy(random_weights(unet))))
    if present:
        add_lora(unet, RANK, present, seed=0)
    before = run(unet)
    with pytest.raises(UserError, match=message) as error:
        load_lora(unet, file)
    assert "\n" not in str(error.value) and has_lora(unet) == bool(present) and torch.equal(run(unet), before)


@pytest.mark.parametrize("mixed", [False, True])
def test_wrong_rank_names_both_shapes(tmp_path, mixed):
    unet = make_unet()
    weights = random_weights(unet, rank=8)
    if mixed:
        weights = random_weights(unet) | {key: value for key, value in weights.items() if key.startswith("mid_block")}
    else:
        add_lora(unet, RANK, TARGETS, seed=0)
    with pytest.raises(UserError, match=r"shape \(8, \d+\), .* \(4, \d+\)"):
        load_lora(unet, write(tmp_path / "rank8.safetensors", legacy(weights)))


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_malicious_pickle_is_not_run(tmp_path, save):
    victim, file = tmp_path / "victim", tmp_path / "weights.bin"
    save({"a": Malicious(victim)}, file)
    with pytest.raises(UserError, match=str(file)):
        load_lora(make_unet(), file)
    assert not victim.exists()


def test_files_that_are_not_weights(tmp_path):
    (tmp_path / "garbage.safetensors").write_bytes(b"not safetensors")
    write(tmp_path / "nothing.safetensors", {})
    torch.save({"epoch": 3, "weights": torch.zeros(2)}, tmp_path / "mixed.bin")
    for name in ("absent.safetensors", "", "garbage.safetensors", "nothing.safetensors", "mixed.bin"):
        with pytest.raises(UserError, match=str(tmp_path / name)):
            load_lora(make_unet(), tmp_path / name)
