"""PPO's clipped surrogate loss (Schulman et al. 2017, equation 7) for denoising steps, and KL to the base model."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_mean_std


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, adv_clip_max: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the negative clipped surrogate, averaged over the batch, and its statistics (detached 0-d tensors).

    Args:
        log_prob, old_log_prob: (B,) under the policy being trained and under the one that sampled.
        advantages: (B,), clipped to [-adv_clip_max, adv_clip_max].
        clip_range: moving the ratio outside [1 - clip_range, 1 + clip_range] earns nothing. Log-probs here are means
            over the D latent dimensions, so this bounds the true log-ratio by about D * clip_range nats.

    Raises ValueError if shapes differ: broadcasting (B,) against (B, 1) would pair every sample with all others.
    """
    if not log_prob.shape == old_log_prob.shape == advantages.shape:
        raise ValueError(f"one shape expected: {log_prob.shape}, {old_log_prob.shape}, {advantages.shape}")
    advantages = advantages.clamp(-adv_clip_max, adv_clip_max)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()

    with torch.no_grad():
        deviation = (ratio - 1).abs()
        # both KL estimates use per-dimension log-probs, so they are far below the KL divergence of the full latents
        info = {
            "approx_kl": 0.5 * (log_ratio**2).mean(),  # the official code's estimate of KL(old || new)
            # "k3" (Schulman 2020), unbiased and never negative; expm1, since ratio - 1 loses digits to cancellation
            "approx_kl_k3": (torch.expm1(log_ratio) - log_ratio).mean(),
            "clipfrac": (deviation > clip_range).float().mean(),
            "ratio_mean": ratio.mean(),
            "ratio_max_deviation": deviation.max(),  # 0 before the first update
        }
    return loss, info


def step_kl(
    scheduler: DDIMScheduler, model_output: Tensor, base_output: Tensor, timestep: Tensor, sample: Tensor, eta: float
) -> Tensor:
    """Return KL(policy || base) of denoising steps, a scalar: the mean over samples and latent dimensions."""
    mean, std = ddim_mean_std(scheduler, model_output, timestep, sample, eta)
    base_mean, _ = ddim_mean_std(scheduler, base_output, timestep, sample, eta)
    return ((mean - base_mean) ** 2 / (2 * std**2)).mean()  # of Gaussians with the same standard deviation


def averages(accelerator: Accelerator, statistics: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the mean of each 0-d tensor over all entries and processes; NaN where no value is finite.

    Every process must pass the same number of entries. Non-finite values come from skipped updates and are ignored.
    """
    if not statistics:
        return {}
    table = torch.stack([torch.stack([entry[key].float() for key in statistics[0]]) for entry in statistics])
    # one device-to-host copy
    means = torch.stack([values[values.isfinite()].mean() for values in table.cpu().T])
    return dict(zip(statistics[0], accelerator.reduce(means.to(table.device), "mean").tolist(), strict=True))
