"""LoRA adapters in a UNet: how they begin, that they train, and that they can be switched off."""

import pytest
import torch
from tiny_unet import RANK, TARGETS, make_unet, projections, randomize, run

from ddpo_pytorch.generator.lora import add_lora, disabled_lora, has_lora, lora_parameters, lora_state_dict
from ddpo_pytorch.utils.errors import UserError


def test_new_adapters_change_nothing_and_follow_the_seed():
    unet, again, other, half = make_unet(), make_unet(), make_unet(), make_unet().half()
    base = run(unet)
    for model, seed in ((unet, 3), (again, 3), (other, 4), (half, 3)):
        add_lora(model, RANK, TARGETS, seed)
    assert torch.equal(run(unet), base)
    first, second = lora_state_dict(unet), lora_state_dict(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], value) for key, value in lora_state_dict(other).items())
    assert all(torch.equal(first[key], value) for key, value in lora_state_dict(half).items())
    assert len(first) == 2 * len(projections(make_unet()))

    down = torch.cat([value.flatten() for key, value in first.items() if "lora_A" in key])
    assert down.std().item() == pytest.approx(1 / RANK, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(half))
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(lora_parameters(unet)) == len(first)
    assert all(".lora_" in name for name in trainable)


def test_disabled_lora_is_the_base_model():
    unet = make_unet()
    base = run(unet)
    add_lora(unet, RANK, TARGETS, seed=0)
    randomize(unet)
    adapted = run(unet)
    assert (adapted - base).abs().max() > 0.01
    frozen = lora_parameters(unet)[0].requires_grad_(False)
    with disabled_lora(unet):
        assert torch.equal(run(unet), base)
    assert torch.equal(run(unet), adapted)
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in lora_parameters(unet)[1:])
    with pytest.raises(RuntimeError, match="inside"), disabled_lora(unet):
        raise RuntimeError("inside")
    assert torch.equal(run(unet), adapted)


def test_gradients_survive_a_disabled_pass():
    """A KL term runs the base model between the policy's forward and backward pass."""
    unet = make_unet()
    add_lora(unet, RANK, TARGETS, seed=0)
    sample, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 12)
    loss = unet(sample, 5, encoder_hidden_states=text).sample.square().mean()
    with disabled_lora(unet), torch.no_grad():
        unet(sample, 5, encoder_hidden_states=text)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in lora_parameters(unet))


def test_add_lora_refuses_mistakes():
    unet = make_unet()
    with pytest.raises(UserError, match="rank is 0"):
        add_lora(unet, 0, TARGETS, seed=0)
    for target in ("to_x", "norm1"):
        with pytest.raises(UserError, match=f"'{target}' names no linear or convolutional layer"):
            add_lora(unet, RANK, ("to_q", target), seed=0)
    assert not has_lora(unet)
    add_lora(unet, RANK, TARGETS, seed=0)
    with pytest.raises(UserError, match="already"):
        add_lora(unet, RANK, TARGETS, seed=0)
