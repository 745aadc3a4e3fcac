"""The DDIM step as a policy: against diffusers' own step and torch's own normal distribution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from refusals import refused
from torch.distributions import Normal

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule, ddim_step_with_logprob

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # SD 1.5's
SCHEDULE |= {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def make_scheduler(steps: int = 50, **changes) -> DDIMScheduler:
    scheduler = DDIMScheduler(**SCHEDULE | changes)
    scheduler.set_timesteps(steps)
    return scheduler


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a model output and a sample: (2, size, 4, 8, 8)."""
    return torch.randn(2, size, 4, 8, 8, generator=seeded(0)).to(dtype)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("eta", "changes"), [(0.0, {}), (0.5, {"clip_sample": True}), (1.0, {"thresholding": True})])
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
        x, epsilon = sample[i].double(), output[i].double()
        if prediction_type == "sample":
            epsilon = (x - math.sqrt(alpha) * epsilon) / math.sqrt(1 - alpha)
        elif prediction_type == "v_prediction":
            epsilon = math.sqrt(alpha) * epsilon + math.sqrt(1 - alpha) * x
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        clean = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        mean = math.sqrt(alpha_prev) * clean + math.sqrt(1 - alpha_prev - sigma**2) * epsilon
        expected = Normal(mean, sigma).log_prob(previous[i].double()).mean()
        assert log_prob[i].item() == pytest.approx(expected.item(), abs=2e-5)


def test_timestep_forms_agree():
    scheduler, (output, sample) = make_scheduler(), random_batch(3)
    forms = [481, torch.tensor(481), torch.tensor([481]), torch.tensor([481, 481, 481])]
    steps = [ddim_step_with_logprob(scheduler, output, form, sample, 1.0, generator=seeded(2)) for form in forms]
    for previous, log_prob in steps[1:]:
        assert torch.equal(previous, steps[0][0]) and torch.equal(log_prob, steps[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rescoring_stored_latents_gives_ratio_one(dtype):
    """The density is that of the latents as stored; every step, the last ones above all, where variances are small."""
    # the last step would have no variance at alpha 1
    scheduler, (output, sample) = make_scheduler(set_alpha_to_one=True), random_batch(4, dtype=dtype)
    for timestep in scheduler.timesteps:
        stored, old = ddim_step_with_logprob(scheduler, output, timestep, sample, 1.0, generator=seeded(5))
        assert stored.dtype == dtype and old.dtype == torch.float32
        _, new = ddim_step_with_logprob(scheduler, output, timestep, sample, 1.0, prev_sample=stored)
        assert torch.equal(new, old) and new.isfinite().all()


def test_scoring_has_a_gradient_through_the_model_only():
    scheduler, (output, sample) = make_scheduler(), random_batch(2)
    output.requires_grad_()
    previous = torch.randn(sample.shape, generator=seeded(0)).requires_grad_()
    _, log_prob = ddim_step_with_logprob(scheduler, output, 501, sample, 1.0, prev_sample=previous)
    log_prob.sum().backward()
    assert output.grad.abs().sum() > 0 and previous.grad is None


def test_contradictory_arguments_and_schedules_that_cannot_be_trained_are_refused():
    scheduler, (output, sample) = make_scheduler(), random_batch(2)
    bad = [(-0.1, {}, "eta is -0.1"), (math.nan, {}, "eta is nan"), (0.0, {"prev_sample": sample}, "eta is 0")]
    bad += [(1.0, {"prev_sample": sample, "generator": seeded(0)}, "not both")]
    for eta, options, message in *bad, (1.0, {"generator": [seeded(0)]}, "1 generators for a batch of 2"):
        with pytest.raises(ValueError, match=message):
            ddim_step_with_logprob(scheduler, output, 501, sample, eta, **options)
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim_step_with_logprob(DDIMScheduler(), output, 501, sample, 1.0)
    assert ddim_step_with_logprob(scheduler, output, 501, sample, 0.0)[1] is None
    for eta in (0.0, -1.0, math.nan, 5.0):
        refused(f"sample.eta is {eta}: .*0 < eta <= 1", check_schedule, scheduler, eta)
    refused("timestep 0 has zero variance", check_schedule, make_scheduler(steps_offset=0), 1.0)
    zero_terminal_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check_schedule(make_scheduler(10, prediction_type="v_prediction", **zero_terminal_snr), 1.0)
