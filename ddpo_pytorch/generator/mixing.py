"""Fine-tuning on what judges chose (RAFT, Dong et al. 2023): a pool's latents, weighted, among those of real images."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import Range, check_ranges

REAL_SHARE = Range("[0.5, 1]")  # half of the images are real, or more


class MixedLatents(Dataset):
    """Items (mean, logvar, caption id, weight): the real images and as many from the pool as `real_share` asks for.

    One pass has every real image once, with weight 1, and round(real (1 - real_share) / real_share) items of the pool,
    which is gone through from its beginning as often as that takes; pool image i has weight w_i / mean(w). So the real
    images keep the generator from drifting into what the judges do not see, whatever the size of the pool.

    Args:
        real, pool: latents whose caption ids count in the same list (`LatentShards.renumber`).
        weights: (len(pool),), not negative, not all 0; the judges' scores.
        real_share: in [0.5, 1].

    Raises UserError for another share or weights.
    """

    def __init__(self, real: LatentShards, pool: LatentShards, weights: Sequence[float], real_share: float):
        check_ranges({"real_share": real_share}, {"real_share": REAL_SHARE}, "sd.")
        values = torch.tensor(weights, dtype=torch.float32)
        if len(values) != len(pool) or not (values >= 0).all() or not values.sum() > 0:
            raise UserError(
                f"{len(values)} weights for {len(pool)} images of the pool, or weights that are not positive numbers; "
                "draw the pool again with scripts/generate.py"
            )
        self.real, self.pool, self.weights = real, pool, values / values.mean()
        self.drawn = round(len(real) * (1 - real_share) / real_share)

    @property
    def captions(self) -> list[str]:
        return list(dict.fromkeys([*self.real.captions, *self.pool.captions]))

    def digests(self) -> list[str]:
        """Hashes of all that is learned from, weights included."""
        return [*self.real.digests(), *self.pool.digests(), str(self.weights.tolist()), str(self.drawn)]

    def shares_images_with(self, other: LatentShards) -> bool:
        """See `LatentShards.shares_images_with`; of the real images."""
        return self.real.shares_images_with(other)

    def renumber(self, captions: Sequence[str]) -> None:
        """See `LatentShards.renumber`; for both parts."""
        self.real.renumber(captions)
        self.pool.renumber(captions)

    def __len__(self) -> int:
        return len(self.real) + self.drawn

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        if position < len(self.real):
            return *self.real[position], torch.ones(())
        index = (position - len(self.real)) % len(self.pool)
        return *self.pool[index], self.weights[index]
