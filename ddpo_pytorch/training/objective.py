"""What an experiment asks of the generator: its prompts, the reward of their images, and an independent judge."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from ml_collections import ConfigDict

from ddpo_pytorch.prompts import PROMPT_LISTS, Prompt, all_prompts, get_prompt_fn
from ddpo_pytorch.rewards import RewardFn, build_reward, check_prompts, parse_spec
from ddpo_pytorch.rollout import draw_prompts
from ddpo_pytorch.training.held_out import HeldOut, Sampling, load_judge

TRIED_PROMPTS = 32  # of a function without a list of its prompts; the reward is tried on them before training


class Objective(NamedTuple):
    """Attributes:
    prompt_fn: draws a prompt and its metadata.
    prompts: all that it can draw, or None where that is not known.
    reward_fn: scores images of them.
    held_out: the evaluation at fixed noise, or None if it is off.
    """

    prompt_fn: Callable[..., Prompt]
    prompts: list[Prompt] | None
    reward_fn: RewardFn
    held_out: HeldOut | None


def make_objective(
    prompt_fn: str,
    prompt_fn_kwargs: ConfigDict,
    reward_fn: str,
    reward_fn_kwargs: ConfigDict,
    held_out: ConfigDict,
    sample: ConfigDict,
    seed: int,
    device: torch.device,
) -> Objective:
    """The objective that these settings name, of which each part has been tried on the prompts.

    Raises UserError for what does not exist, does not fit, or cannot be judged.
    """
    draw = get_prompt_fn(prompt_fn, **prompt_fn_kwargs)
    reward = build_reward(reward_fn, reward_fn_kwargs.to_dict(), device)
    sampled = dict(zip(*draw_prompts(draw, seed, 0, TRIED_PROMPTS), strict=True))
    prompts = all_prompts(prompt_fn, **prompt_fn_kwargs) if prompt_fn in PROMPT_LISTS else None
    check_prompts(reward, list(sampled.items()) if prompts is None else prompts)
    if not held_out.every:
        return Objective(draw, prompts, reward, None)
    judged = all_prompts(prompt_fn, **prompt_fn_kwargs)
    rewarding = [reward_fn_kwargs.get(name, {}).get("classifier") for name in parse_spec(reward_fn)]
    judge = load_judge(held_out.classifier, filter(None, rewarding), device)
    evaluation = HeldOut(judge, judged, held_out.images_per_prompt, seed, Sampling.of(sample))
    return Objective(draw, prompts, reward, evaluation)
