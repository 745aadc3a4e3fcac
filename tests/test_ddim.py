"""The DDIM step as a policy: against diffusers' own step and torch's own normal distribution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule, ddim_mean_std, ddim_step_with_logprob
from ddpo_pytorch.utils.errors import UserError

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def make_scheduler(steps: int = 50, **changes) -> DDIMScheduler:
    """SD 1.5's scheduler."""
    config = SD_BETAS | {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False} | changes
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def random_batch(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A model output and a sample (size, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True}, {"timestep_spacing": "trailing"}],
    ids=["sd", "clip", "threshold", "trailing"],
)
def test_step_equals_diffusers(prediction_type, eta, changes):
    scheduler = make_scheduler(20, prediction_type=prediction_type, **changes)
    output, sample = random_batch(2)
    for timestep in scheduler.timesteps:
        expected = scheduler.step(output, timestep, sample, eta=eta, generator=seeded(3)).prev_sample
        ours, _ = ddim_step_with_logprob(scheduler, output, timestep, sample, eta, generator=seeded(3))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_prob_is_mean_normal_density(prediction_type, eta):
    """Mean and deviation are written out here from the DDIM paper's equations 12 and 16, in float64."""
    scheduler = make_scheduler(prediction_type=prediction_type)
    timesteps = scheduler.timesteps[[0, 10, 30, 48, 49]]
    output, sample = random_batch(5)
    previous, log_prob = ddim_step_with_logprob(scheduler, output, timesteps, sample, eta, generator=seeded(1))
    for i, timestep in enumerate(timesteps.tolist()):
        alpha = scheduler.alphas_cumprod[timestep].item()
        alpha_prev = scheduler.alphas_cumprod[max(timestep - 20, 0)].item()
        x, out = sample[i].double(), output[i].double()
        if prediction_type == "epsilon":
            epsilon = out
        elif prediction_type == "sample":
            epsilon = (x - math.sqrt(alpha) * out) / math.sqrt(1 - alpha)
        else:
            epsilon = math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        clean = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        mean = math.sqrt(alpha_prev) * clean + math.sqrt(1 - alpha_prev - sigma**2) * epsilon
        expected = Normal(mean, sigma).log_prob(previous[i].double()).mean()
        assert log_prob[i].item() == pytest.approx(expected.item(), abs=2e-5)


def test_mean_and_std_are_those_of_the_draws():
    scheduler = make_scheduler()
    output, sample = (tensor[:, :1, :1, :2].expand(20_000, -1, -1, -1) for tensor in random_batch(1))
    mean, std = ddim_mean_std(scheduler, output, 501, sample, 1.0)
    assert mean.shape == sample.shape and std.shape == (1, 1, 1, 1)
    drawn, _ = ddim_step_with_logprob(scheduler, output, 501, sample, 1.0, generator=seeded(0))
    torch.testing.assert_close(drawn.mean(0), mean[0], rtol=0, atol=4 * std.item() / math.sqrt(20_000))
    torch.testing.assert_close(drawn.std(0), std[0].expand(1, 1, 2), rtol=0.03, atol=0)


def test_timestep_forms_agree():
    scheduler = make_scheduler()
    output, sample = random_batch(3)
    forms = [481, torch.tensor(481), torch.tensor([481]), torch.tensor([481, 481, 481])]
    results = [ddim_step_with_logprob(scheduler, output, form, sample, 1.0, generator=seeded(2)) for form in forms]
    for previous, log_prob in results[1:]:
        assert torch.equal(previous, results[0][0])
        assert torch.equal(log_prob, results[0][1])


@pytest.mark.parametrize(
    ("changes", "timestep"),
    [
        ({"set_alpha_to_one": True}, 1),
        ({"set_alpha_to_one": False}, 1),
        # zero terminal signal-to-noise ratio
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 999),
    ],
)
def test_first_and_last_step_are_finite(changes, timestep):
    scheduler = make_scheduler(**changes)
    output, sample = random_batch(2)
    assert timestep in scheduler.timesteps[[0, -1]]
    previous, log_prob = ddim_step_with_logprob(scheduler, output, timestep, sample, 1.0, generator=seeded(0))
    assert torch.isfinite(previous).all() and torch.isfinite(log_prob).all()
    check_schedule(scheduler, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rescoring_stored_latents_gives_ratio_one(dtype):
    """The density is that of the latents as stored; every step, the last ones above all, where variances are small."""
    scheduler = make_scheduler()
    output, sample = random_batch(4, dtype=dtype)
    for timestep in scheduler.timesteps:
        stored, old = ddim_step_with_logprob(scheduler, output, timestep, sample, 1.0, generator=seeded(5))
        assert stored.dtype == dtype
        assert old.dtype == torch.float32
        _, new = ddim_step_with_logprob(scheduler, output, timestep, sample, 1.0, prev_sample=stored)
        assert torch.equal(new, old)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    scheduler = make_scheduler()
    output, sample = random_batch(3)

    def step(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        generators = [seeded(100 + row) for row in rows]
        return ddim_step_with_logprob(scheduler, output[rows], 301, sample[rows], 1.0, generator=generators)

    together, log_prob = step([0, 1, 2])
    for rows in ([1], [2, 0], [2, 1]):
        alone, alone_log_prob = step(rows)
        assert torch.equal(alone, together[rows])
        torch.testing.assert_close(alone_log_prob, log_prob[rows], rtol=0, atol=1e-6)


def test_scoring_has_a_gradient_through_the_model_only():
    scheduler = make_scheduler()
    output, sample = random_batch(2)
    output.requires_grad_()
    previous = torch.randn(sample.shape, generator=seeded(0)).requires_grad_()
    _, log_prob = ddim_step_with_logprob(scheduler, output, 501, sample, 1.0, prev_sample=previous)
    log_prob.sum().backward()
    assert output.grad.abs().sum() > 0
    assert previous.grad is None


def test_contradictory_arguments_are_refused():
    scheduler = make_scheduler()
    output, sample = random_batch(2)
    for eta, options, message in (
        (-0.1, {}, "eta is -0.1"),
        (math.nan, {}, "eta is nan"),
        (0.0, {"prev_sample": sample}, "eta is 0"),
        (1.0, {"prev_sample": sample, "generator": seeded(0)}, "not both"),
        (1.0, {"generator": [seeded(0)]}, "1 generators for a batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ddim_step_with_logprob(scheduler, output, 501, sample, eta, **options)
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim_step_with_logprob(DDIMScheduler(), output, 501, sample, 1.0)
    assert ddim_step_with_logprob(scheduler, output, 501, sample, 0.0)[1] is None


def test_check_schedule_refuses_what_cannot_be_trained():
    for eta in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="eta > 0"):
            check_schedule(make_scheduler(), eta)
    with pytest.raises(UserError, match="timestep 0 has zero variance"):
        check_schedule(make_scheduler(steps_offset=0), 1.0)
    with pytest.raises(UserError, match="0 < eta <= 1"):
        check_schedule(make_scheduler(), 5.0)
    check_schedule(make_scheduler(10), 0.5)
