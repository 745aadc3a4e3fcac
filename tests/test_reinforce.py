"""reinforce.py: the fixed point, the sign, the three objectives in numbers, weights."""

import pytest
import torch

from ddpo_pytorch.rlhf.reinforce import OBJECTIVES, advantages, importance_weights, reinforce_loss
from ddpo_pytorch.utils.errors import UserError

STARTS, REWARDS = (0.02, 0.2, 0.5, 0.8, 0.98), (0.0, 0.5, 1.0)


def descend(objective, start, reward, steps, rate):
    """Scores after gradient descent on the logits, one for each pair of start and reward (both flat)."""
    logits, rewards = torch.tensor(start).logit().requires_grad_(), torch.tensor(reward)
    for _ in range(steps):
        found = advantages(rewards, logits.sigmoid())
        # the mean over N samples that share nothing: N times it is each one's own loss
        loss = len(rewards) * reinforce_loss(logits, found, torch.ones_like(logits), objective)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - rate * gradient).detach().requires_grad_()
    return logits.detach().sigmoid()


def test_scores_reach_the_rewards_from_any_start():
    pairs = [(start, reward) for start in STARTS for reward in REWARDS]
    starts, rewards = map(list, zip(*pairs, strict=True))
    # |A| dies with the distance: p falls as 1 / sqrt(2 t) towards R = 0 at a rate of 1 a step, hence so many of them
    scores = descend("symmetric_log", starts, rewards, 6000, 1.0)
    torch.testing.assert_close(scores, torch.tensor(rewards), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("start", "reward", "expected"),
    # after 300 steps at 0.2, computed on their own: the forms differ in speed, and by much
    [(0.98, 0.5, (0.956, 0.957, 0.500)), (0.98, 0.0, (0.33, 0.61, 0.10)), (0.02, 1.0, (0.90, 0.39, 0.90))],
)
def test_speed_of_the_three_objectives(start, reward, expected):
    found = [descend(name, [start], [reward], 300, 0.2).item() for name in ("log", "delta", "symmetric_log")]
    digits = 0.0005 if reward == 0.5 else 0.005
    assert found == pytest.approx(expected, abs=digits)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_the_stated_one_and_has_the_sign_of_the_advantage(objective):
    logits = torch.linspace(-4, 4, 41, dtype=torch.float64).repeat(3).requires_grad_()
    rewards = torch.tensor(REWARDS, dtype=torch.float64).repeat_interleave(41)
    scores = logits.detach().sigmoid()
    loss = reinforce_loss(logits, advantages(rewards, logits.sigmoid()), torch.ones_like(logits), objective)
    (gradient,) = torch.autograd.grad(loss * len(logits), logits)
    a = rewards - scores
    rising = {
        "symmetric_log": torch.where(a > 0, 1 - scores, scores),
        "log": 1 - scores,
        "delta": scores * (1 - scores),
    }
    torch.testing.assert_close(gradient, -a * rising[objective])
    assert (torch.sign(gradient) == -torch.sign(a)).all()  # descent raises the score where the reward is above it


def test_delta_is_the_gradient_of_half_the_squared_error():
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(1))
    loss = reinforce_loss(logits, advantages(rewards, logits.sigmoid()), torch.ones(64), "delta")
    squared = ((rewards - logits.sigmoid()) ** 2 / 2).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(squared, logits))


def test_extreme_logits_stay_finite():
    for objective in OBJECTIVES:
        logits = torch.tensor([-200.0, 200.0, -200.0, 200.0]).requires_grad_()
        found = advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), logits.sigmoid())
        loss = reinforce_loss(logits, found, torch.ones(4), objective)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


def test_baseline_and_weights_carry_no_gradient():
    logits, policy = torch.zeros(4, requires_grad=True), torch.full((4,), 0.3, requires_grad=True)
    selector = torch.full((4,), 0.6, requires_grad=True)
    weights = importance_weights(selector, policy, 0.2, 5.0) * policy
    reinforce_loss(logits, advantages(torch.ones(4), policy), weights).backward()
    assert logits.grad is not None and policy.grad is None and selector.grad is None
    raw = torch.ones(4) - policy  # an advantage that somebody forgot to detach
    reinforce_loss(logits, raw, torch.ones(4)).backward()
    assert policy.grad is None


def test_weights_multiply_the_loss_of_their_sample():
    logits = torch.tensor([0.3, -1.0, 2.0]).requires_grad_()
    found = advantages(torch.tensor([1.0, 0.0, 0.5]), logits.sigmoid())
    weights = torch.tensor([1 / 3, 1.0, 2 / 3])
    (plain,) = torch.autograd.grad(reinforce_loss(logits, found, torch.ones(3)), logits)
    (weighted,) = torch.autograd.grad(reinforce_loss(logits, found, weights), logits)
    torch.testing.assert_close(weighted, weights * plain)


def test_importance_weights():
    selector, policy = torch.tensor([0.9, 0.5, 0.1, 0.6]), torch.tensor([0.01, 0.5, 0.9, 0.3])
    clipped = torch.tensor([5.0, 1.0, 0.2, 2.0])  # 90, 1, 0.11 and 2 before
    weights = importance_weights(selector, policy, 0.2, 5.0)
    torch.testing.assert_close(weights, clipped / clipped.mean())
    assert weights.mean().item() == pytest.approx(1)
    assert importance_weights(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.5]), 0.2, 5.0).isfinite().all()
    with pytest.raises(UserError, match="importance_range"):
        importance_weights(selector, policy, 5.0, 0.2)


def test_shapes_and_names_are_checked():
    with pytest.raises(UserError, match="rlhf.objective.*'abs'"):
        reinforce_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), "abs")
    with pytest.raises(ValueError, match="shape"):
        reinforce_loss(torch.zeros(2), torch.zeros(2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="shape"):
        advantages(torch.zeros(2), torch.zeros(2, 1))
