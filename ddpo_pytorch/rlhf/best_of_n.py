"""Best of N: draw images for a prompt until enough of them pass the Selector, and rank those by the Policy."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ddpo_pytorch.data.fundus import MODALITY
from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.judges.policy import Policy
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.sampling import Sampler
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number


class Candidate(NamedTuple):
    """A drawn image: uint8 (3, H, W), the seed of its noise, both scores, whether it passed."""

    image: torch.Tensor
    attempt: int
    seed: int
    selector: float
    policy: float
    passed: bool


@dataclass
class Request:
    """The `repetition`-th search for images of a prompt, and its candidates so far.

    `kept` holds the images that passed, or only the last one while none did.
    """

    prompt: str
    repetition: int
    kept: list[Candidate] = field(default_factory=list)
    attempts: int = 0

    @property
    def best(self) -> Candidate:
        """Return the kept image of highest Policy score."""
        return max(self.kept, key=lambda one: one.policy)

    def add(self, candidate: Candidate) -> None:
        self.attempts += 1
        if self.kept and not self.kept[0].passed:
            self.kept.clear()
        if candidate.passed or not self.kept:
            self.kept.append(candidate)


def best_of_n(
    sampler: Sampler,
    selector: Selector,
    policy: Policy,
    requests: Sequence[Request],
    num_candidates: int,
    max_attempts: int,
    batch_size: int,
    seed: int,
) -> Iterator[Request]:
    """Yield each request once `num_candidates` images have passed or `max_attempts` are drawn.

    The image of an attempt is a function of (seed, prompt, repetition, attempt). At most `batch_size` requests are open
    at a time, so that memory does not grow with their number. Scores are those of images in 8 bits, as they are stored.
    Images that are not finite do not pass; a batch without any finite one raises UserError.
    """
    waiting = deque(requests)
    while waiting:
        batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        seeds = [
            derived_seed(seed, Stream.POOL, text_number(one.prompt), one.repetition, one.attempts) for one in batch
        ]
        images = sampler([one.prompt for one in batch], seeds)
        finite = images.flatten(1).isfinite().all(dim=1)
        pixels = to_uint8(images.nan_to_num())
        stored = pixels.float() / 255
        quality, alignment = selector.score(stored), policy.score(stored, [one.prompt for one in batch])
        passed = (selector.accepts(quality).cpu() & finite.cpu()).tolist()
        rows = zip(pixels.cpu(), seeds, quality.tolist(), alignment.tolist(), passed, strict=True)
        for one, (image, image_seed, selector_score, policy_score, passes) in zip(batch, rows, strict=True):
            one.add(Candidate(image, one.attempts, image_seed, selector_score, policy_score, passes))
        if not finite.any():
            raise UserError(f"images of {batch[0].prompt!r} are not finite; use mixed_precision bf16 or no")
        open_ones = []
        for one in batch:
            count = sum(candidate.passed for candidate in one.kept)
            if count >= num_candidates or one.attempts >= max_attempts:
                yield one
            else:
                open_ones.append(one)
        waiting.extendleft(reversed(open_ones))


def log_entries(request: Request, max_attempts: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return the entry of image_log.json and the pixels of each kept image of a request.

    A file is named by modality, number and both scores: Fundus_3_selector_0.87_policy_0.64.png. The reward is that of
    `rewards.fundus_alignment`.
    """
    best, entries = request.best, []
    for one in request.kept:
        number = request.repetition * max_attempts + one.attempt
        name = f"{MODALITY}_{number}_selector_{one.selector:.2f}_policy_{one.policy:.2f}.png"
        entry = {
            "prompt": request.prompt,
            "path_to_img": f"images/{folder_name(request.prompt)}/{name}",
            "reward": f"{one.policy * one.passed:.4f}",
            "selector": round(one.selector, 6),
            "policy": round(one.policy, 6),
            "passed": one.passed,
            "best": one is best,
            "seed": one.seed,
            "attempts": request.attempts,
        }
        entries.append((entry, one.image))
    return entries
