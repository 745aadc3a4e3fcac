"""The clipped surrogate, against the formula written out sample by sample."""

import math

import pytest
import torch

from ddpo_pytorch.ppo import ppo_loss


def by_hand(log_prob, old, advantage, clip, adv_max) -> float:
    """Negative of PPO's equation 7 for one sample, in plain floats."""
    advantage = min(max(advantage, -adv_max), adv_max)
    ratio = math.exp(log_prob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def test_loss_and_info_equal_the_formula():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, generator=generator, dtype=torch.float64)
    new = old + 0.2 * torch.randn(64, generator=generator, dtype=torch.float64)
    advantages = 4 * torch.randn(64, generator=generator, dtype=torch.float64)
    loss, info = ppo_loss(new, old, advantages, clip_range=0.1, adv_clip_max=5)
    triples = list(zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True))
    assert loss.item() == pytest.approx(sum(by_hand(*t, 0.1, 5) for t in triples) / 64, rel=1e-12)

    ratios = [math.exp(n - o) for n, o, _ in triples]
    assert info["approx_kl"].item() == pytest.approx(sum((n - o) ** 2 for n, o, _ in triples) / 128)
    k3 = sum(r - 1 - math.log(r) for r in ratios) / 64
    assert info["approx_kl_k3"].item() == pytest.approx(k3)
    assert info["clipfrac"].item() == pytest.approx(sum(abs(r - 1) > 0.1 for r in ratios) / 64)
    assert info["ratio_mean"].item() == pytest.approx(sum(ratios) / 64)
    assert info["ratio_max_deviation"].item() == pytest.approx(max(abs(r - 1) for r in ratios))
    assert 0 < info["clipfrac"] < 1


def test_same_policy_is_plain_policy_gradient():
    """At ratio 1 the gradient is REINFORCE's, -advantage / B, and every diagnostic of change is exactly zero."""
    log_prob = torch.tensor([-1.2, 0.3, -0.7], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, info = ppo_loss(log_prob, log_prob.detach().clone(), advantages, 1e-4, 5)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages / 3)
    assert info["ratio_mean"] == 1
    for key in ("approx_kl", "approx_kl_k3", "clipfrac", "ratio_max_deviation"):
        assert info[key] == 0
        assert info[key].ndim == 0
        assert not info[key].requires_grad


def test_no_gradient_beyond_the_clip_range_where_it_would_gain():
    old = torch.zeros(4)
    log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss, _ = ppo_loss(log_prob, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.1, 5)
    loss.backward()
    # the first two moved too far in the direction that pays; the last two must still be pulled back
    assert torch.equal(log_prob.grad[:2], torch.zeros(2))
    assert (log_prob.grad[2:].abs() > 0.1).all()


def test_k3_keeps_its_digits_for_tiny_changes():
    """At log-ratios of 1e-4, the size of clip_range, k3 is 5e-9: float32's own ratio - 1 is off by more than that."""
    delta = torch.full((8,), 1e-4)
    _, info = ppo_loss(delta, torch.zeros(8), torch.ones(8), 1e-4, 5)
    assert info["approx_kl_k3"].item() == pytest.approx(5e-9, rel=1e-2)
    assert info["approx_kl"].item() == pytest.approx(5e-9, rel=1e-5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        ppo_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1), 0.1, 5)
