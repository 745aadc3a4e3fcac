"""A DDIM step as a Gaussian policy: its mean and standard deviation, samples, and their log-probability.

With noise (eta > 0) a DDIM step is a Gaussian with diagonal covariance (DDIM paper, equation 12), so denoising is a
Markov chain with known transition densities, which is all a policy gradient needs (DDPO, section 4.3).
"""

import math

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from ddpo_pytorch.utils.distributed import to_device
from ddpo_pytorch.utils.errors import UserError

Timestep = int | torch.Tensor
Generators = torch.Generator | list[torch.Generator] | None


def _alphas(scheduler: DDIMScheduler, timestep: Timestep, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cumulative alphas before and after the step, float32 (B,), or (1,) for a single timestep.

    After the last step the timestep is clamped to 0, i.e. to alphas_cumprod[0], whatever set_alpha_to_one says: with
    alpha 1 the last step would have no variance and hence no density.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no timesteps yet; call scheduler.set_timesteps(num_inference_steps) first")
    timesteps = torch.as_tensor(timestep, device=device).reshape(-1).long()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # as in DDIMScheduler.step
    table = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)  # (num_train_timesteps,)
    return table[timesteps], table[(timesteps - stride).clamp(min=0)]


def _variance(alpha: torch.Tensor, alpha_prev: torch.Tensor) -> torch.Tensor:
    """Return the variance of the step at eta = 1 (DDIM paper, equation 16, squared)."""
    return (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)


def _clean_and_noise(
    prediction_type: str, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted x0 and epsilon (B, C, H, W), where sample = sqrt(alpha) x0 + sqrt(1 - alpha) epsilon."""
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return (sample - noise * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / noise
    if prediction_type == "v_prediction":
        return signal * sample - noise * model_output, signal * model_output + noise * sample
    raise ValueError(f"prediction_type is {prediction_type!r}; it can be 'epsilon', 'sample' or 'v_prediction'")


def ddim_mean_std(
    scheduler: DDIMScheduler, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of p(x_prev | x_t) for a DDIM step (DDIM paper, equations 12 and 16).

    Args:
        scheduler: after `set_timesteps`; its prediction type, thresholding and clipping are honoured.
        model_output, sample: (B, C, H, W), the UNet's output (after guidance) for the latents x_t.
        timestep: one for the whole batch (int or 0-d), or (B,).
        eta: amount of noise, >= 0; 1 is DDPM's.

    Returns:
        mean (B, C, H, W) and std (B, 1, 1, 1) or (1, 1, 1, 1), always float32: half precision would lose the small
        variances of the last steps.
    """
    if not eta >= 0:
        raise ValueError(f"eta is {eta}; it cannot be negative")
    model_output, sample = model_output.float(), sample.float()
    per_sample = (-1, *[1] * (sample.ndim - 1))
    alpha, alpha_prev = (a.view(per_sample) for a in _alphas(scheduler, timestep, sample.device))  # (B, 1, 1, 1)

    clean, noise = _clean_and_noise(scheduler.config.prediction_type, model_output, sample, alpha)
    if scheduler.config.thresholding:
        clean = scheduler._threshold_sample(clean)
    elif scheduler.config.clip_sample:
        limit = scheduler.config.clip_sample_range
        clean = clean.clamp(-limit, limit)

    std = eta * _variance(alpha, alpha_prev).sqrt()
    # at alpha = 0 and eta = 1, rounding can lift std**2 slightly above 1 - alpha_prev
    direction = (1 - alpha_prev - std**2).clamp(min=0).sqrt()
    mean = alpha_prev.sqrt() * clean + direction * noise
    return mean, std


def ddim_step_with_logprob(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: Timestep,
    sample: torch.Tensor,
    eta: float,
    generator: Generators = None,
    prev_sample: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take a DDIM step, or score an earlier one; return the next latents and their log-probability.

    Without `prev_sample` the next latents are drawn; with it they are scored, with a gradient through `model_output`
    only. In both cases the density is that of latents rounded to the dtype of `sample`, in which they are stored:
    otherwise the PPO ratio would differ from 1.

    Args (the others as for `ddim_mean_std`):
        generator: source of the noise, one or a list with one per sample; None uses torch's global one.
        prev_sample: (B, C, H, W), the next latents to score.

    Returns:
        The next latents (B, C, H, W) in the dtype of `sample`, and their log-probability (B,) in float32: the *mean* of
        the Gaussian log density over the D latent dimensions, as in DDPO's code, so a ratio of two such densities is
        the D-th root of the true one. None when sampling with eta = 0, where there is no density.
    """
    scoring = prev_sample is not None
    if scoring and generator is not None:
        raise ValueError("give either prev_sample (to score a step) or generator (to draw one), not both")
    mean, std = ddim_mean_std(scheduler, model_output, timestep, sample, eta)  # (B, C, H, W), (B or 1, 1, 1, 1)
    if eta == 0:
        if scoring:
            raise ValueError("eta is 0: the step is deterministic and has no log-probability; score with eta > 0")
        return mean.to(sample.dtype), None
    if not scoring:
        if isinstance(generator, list) and len(generator) != len(mean):
            raise ValueError(f"{len(generator)} generators for a batch of {len(mean)}; give one, or one per sample")
        source = generator[0] if isinstance(generator, list) else generator
        place = mean.device if source is None else source.device
        noise = to_device(randn_tensor(mean.shape, generator, place, mean.dtype), mean.device)
        prev_sample = (mean + std * noise).to(sample.dtype)

    squared_error = (prev_sample.detach().float() - mean) ** 2  # detached: the action is data, not a function of theta
    log_density = -squared_error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)  # (B, C, H, W)
    return prev_sample, log_density.flatten(1).mean(dim=1)  # (B,)


def check_schedule(scheduler: DDIMScheduler, eta: float) -> None:
    """Raise UserError unless every step of the schedule is a Gaussian with positive variance, as training needs.

    Rejects eta <= 0, a timestep without variance (schedules that begin at timestep 0), and an eta so large that a
    step would add more noise than the next timestep holds.
    """
    if not eta > 0:
        raise UserError(f"sample.eta is {eta}: DDIM without noise is not a policy; set 0 < eta <= 1 (DDPO uses 1.0)")
    timesteps = scheduler.timesteps  # (T,)
    alpha, alpha_prev = _alphas(scheduler, timesteps, timesteps.device)
    variance = eta**2 * _variance(alpha, alpha_prev)
    for timestep, var, room in zip(timesteps.tolist(), variance.tolist(), (1 - alpha_prev).tolist(), strict=True):
        if not var > 0:
            raise UserError(
                f"the DDIM step at timestep {timestep} has zero variance, so its log-probability is infinite; set "
                "steps_offset to 1 in the model's scheduler_config.json"
            )
        if var > room * (1 + 1e-5):
            problem = f"the step at timestep {timestep} would add more noise than the next timestep holds"
            raise UserError(f"sample.eta is {eta}: {problem}; set 0 < eta <= 1")
