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


def _alphas(scheduler: DDIMScheduler, timestep: Timestep, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the cumulative alphas before and after the step, and the step's variance at eta = 1: float32 (B or 1,).

    The variance is the square of the DDIM paper's equation 16. After the last step the timestep is clamped to 0, i.e.
    to alphas_cumprod[0], whatever set_alpha_to_one says: with alpha 1 that step would have no variance and no density.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no timesteps yet; call scheduler.set_timesteps(num_inference_steps) first")
    timesteps = torch.as_tensor(timestep, device=device).reshape(-1).long()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # as in DDIMScheduler.step
    table = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)  # (num_train_timesteps,)
    alpha, alpha_prev = table[timesteps], table[(timesteps - stride).clamp(min=0)]
    return alpha, alpha_prev, (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)


def ddim_mean_std(
    scheduler: DDIMScheduler, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (B, C, H, W) and standard deviation (B or 1, 1, 1, 1) of p(x_prev | x_t) for a DDIM step, in float32.

    DDIM paper, equations 12 and 16. Half precision would lose the small variances of the last steps. `model_output` is
    the UNet's, after guidance, for the latents x_t `sample`, both (B, C, H, W), at `timestep`: (B,), or one for all.
    The scheduler's prediction type, thresholding and clipping are honoured. `eta` is the amount of noise; 1 is DDPM's.
    """
    if not eta >= 0:
        raise ValueError(f"eta is {eta}; it cannot be negative")
    model_output, sample = model_output.float(), sample.float()
    per_sample = (-1, *[1] * (sample.ndim - 1))
    alpha, alpha_prev, variance = (a.view(per_sample) for a in _alphas(scheduler, timestep, sample.device))

    # predicted x0 and epsilon (B, C, H, W): sample = signal x0 + sigma epsilon
    signal, sigma, kind = alpha.sqrt(), (1 - alpha).sqrt(), scheduler.config.prediction_type
    if kind == "epsilon":
        clean, noise = (sample - sigma * model_output) / signal, model_output
    elif kind == "sample":
        clean, noise = model_output, (sample - signal * model_output) / sigma
    elif kind == "v_prediction":
        clean, noise = signal * sample - sigma * model_output, signal * model_output + sigma * sample
    else:
        raise ValueError(f"prediction_type is {kind!r}; it can be 'epsilon', 'sample' or 'v_prediction'")
    if scheduler.config.thresholding:
        clean = scheduler._threshold_sample(clean)
    elif scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)

    std = eta * variance.sqrt()
    # at alpha = 0 and eta = 1, rounding can lift std**2 slightly above 1 - alpha_prev
    direction = (1 - alpha_prev - std**2).clamp(min=0).sqrt()
    return alpha_prev.sqrt() * clean + direction * noise, std


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
        The next latents (B, C, H, W) in the dtype of `sample`, and their log-probability (B,) in float32, or None if
        eta is 0: the *mean* of the Gaussian log density over the D latent dimensions, as in DDPO's code, so a ratio of
        two such densities is the D-th root of the true one.
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
    """Raise UserError unless every step is a Gaussian of positive variance, at most the noise of the next timestep."""
    if not eta > 0:
        raise UserError(f"sample.eta is {eta}: DDIM without noise is not a policy; set 0 < eta <= 1 (DDPO uses 1.0)")
    timesteps = scheduler.timesteps  # (T,)
    _, alpha_prev, variance = _alphas(scheduler, timesteps, timesteps.device)
    for timestep, var, room in torch.stack([timesteps, eta**2 * variance, 1 - alpha_prev], 1).tolist():
        step = f"the DDIM step at timestep {timestep:g}"
        if not var > 0:
            problem = f"{step} has zero variance, so its log-probability is infinite"
            raise UserError(f"{problem}; set steps_offset to 1 in the model's scheduler_config.json")
        if var > room * (1 + 1e-5):
            raise UserError(f"sample.eta is {eta}: {step} adds more noise than the next one holds; set 0 < eta <= 1")
