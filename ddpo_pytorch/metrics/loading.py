"""Image files as batches of tensors, decoded by threads ahead of their use."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ddpo_pytorch.data.images import load_image
from ddpo_pytorch.errors import UserError

THREADS = 8


def load_batches(paths: Sequence[Path], batch_size: int, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Images (B, 3, H, W) in [0, 1], `batch_size` at a time, in the order of `paths`.

    Raises UserError for a file that is no image or is not `shape` = (H, W): two sets that were resized differently
    must not be compared.
    """
    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = [pool.submit(load_image, path) for path in chunks[0]] if chunks else []
        for i, chunk in enumerate(chunks):
            current = ahead
            ahead = [pool.submit(load_image, path) for path in chunks[i + 1]] if i + 1 < len(chunks) else []
            images = [future.result() for future in current]
            for path, image in zip(chunk, images, strict=True):
                if tuple(image.shape[1:]) != tuple(shape):
                    raise UserError(
                        f"{str(path)!r} is {image.shape[1]} x {image.shape[2]} px, others {shape[0]} x {shape[1]}; "
                        "write the real images at the size of the generated ones (--config.dataset.image_size)"
                    )
            yield torch.stack(images)
