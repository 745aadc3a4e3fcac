"""reinforce.py: the fixed point, the sign, the three objectives in numbers, weights."""

import pytest
import torch
from refusals import refused

from ddpo_pytorch.rlhf.reinforce import OBJECTIVES, advantages, reinforce_loss


def test_speed_of_the_three_objectives():
    """Scores after 300 steps at 0.2, computed on their own: the forms differ in speed, and by much."""
    expected = {"log": (0.956, 0.33, 0.90), "delta": (0.957, 0.61, 0.39), "symmetric_log": (0.5, 0.10, 0.90)}
    rewards = torch.tensor([0.5, 0.0, 1.0])
    for name, values in expected.items():
        logits = torch.tensor([0.98, 0.98, 0.02]).logit().requires_grad_()
        for _ in range(300):
            # the mean over three samples that share nothing: three times it is each one's own loss
            loss = 3 * reinforce_loss(logits, advantages(rewards, logits.sigmoid()), torch.ones(3), name)
            logits = (logits - 0.2 * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
        found = logits.sigmoid().tolist()
        assert found[0] == pytest.approx(values[0], abs=0.0005) and found[1:] == pytest.approx(values[1:], abs=0.005)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_the_stated_one_and_has_the_sign_of_the_advantage(objective):
    logits = torch.linspace(-4, 4, 41, dtype=torch.float64).repeat(3).requires_grad_()
    rewards = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).repeat_interleave(41)
    weights = torch.linspace(1 / 3, 1, len(logits), dtype=torch.float64)
    scores = logits.detach().sigmoid()
    loss = reinforce_loss(logits, advantages(rewards, logits.sigmoid()), weights, objective)
    (gradient,) = torch.autograd.grad(loss * len(logits), logits)
    a = rewards - scores
    rising = {"symmetric_log": torch.where(a > 0, 1 - scores, scores), "log": 1 - scores}
    rising["delta"] = scores * (1 - scores)  # the gradient of (R - p)^2 / 2
    torch.testing.assert_close(gradient, -weights * a * rising[objective])
    assert (torch.sign(gradient) == -torch.sign(a)).all()  # descent raises the score where the reward is above it

    extreme = torch.tensor([-200.0, 200.0, -200.0, 200.0]).requires_grad_()
    found = advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), extreme.sigmoid())
    loss = reinforce_loss(extreme, found, torch.ones(4), objective)
    assert loss.isfinite() and torch.autograd.grad(loss, extreme)[0].isfinite().all()
    refused("rlhf.objective.*'abs'", reinforce_loss, extreme, found, torch.ones(4), "abs")
    with pytest.raises(ValueError, match="shape"):
        advantages(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="shape"):
        reinforce_loss(torch.zeros(2), torch.zeros(2, 1), torch.ones(2), objective)


def test_baseline_and_weights_carry_no_gradient():
    logits, policy = torch.zeros(4, requires_grad=True), torch.full((4,), 0.3, requires_grad=True)
    reinforce_loss(logits, torch.ones(4) - policy, 2 * policy).backward()  # an advantage that somebody forgot to detach
    assert logits.grad is not None and policy.grad is None
