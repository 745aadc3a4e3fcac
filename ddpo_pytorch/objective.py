"""What an experiment asks of the generator: its prompts, the reward of their images, and an independent judge."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from ml_collections import ConfigDict

from ddpo_pytorch.held_out import HeldOut, Sampling, load_judge
from ddpo_pytorch.prompts import PROMPT_LISTS, Prompt, all_prompts, check_prompt, get_prompt_fn
from ddpo_pytorch.rewards import RewardFn, build_reward, check_prompts, parse_spec
from ddpo_pytorch.rollout import draw_prompts


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
    draw_prompts(draw, seed, 0, 1)
    prompts = None
    if prompt_fn in PROMPT_LISTS:
        prompts = all_prompts(prompt_fn, **prompt_fn_kwargs)
        for prompt, _ in prompts:
            check_prompt(prompt)  # here as in eval.py, which would otherwise refuse them after the training
        check_prompts(reward, prompts)
    if not held_out.every:
        return Objective(draw, prompts, reward, None)
    rewarding = [reward_fn_kwargs.get(name, {}).get("classifier") for name in parse_spec(reward_fn)]
    judge = load_judge(held_out.classifier, filter(None, rewarding), device)
    asked = all_prompts(prompt_fn, **prompt_fn_kwargs)
    evaluation = HeldOut(judge, asked, held_out.images_per_prompt, seed, Sampling.of(sample))
    return Objective(draw, prompts, reward, evaluation)
