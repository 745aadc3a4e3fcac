"""The classifier's logits for a whole set of images, alike for any number of processes."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ddpo_pytorch.data.image_cache import loader_options
from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.judges.classifier import ArtifactClassifier


def predict(
    accelerator: Accelerator, model: ArtifactClassifier, files: ImageFiles, batch_size: int, num_workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels (N, H) of all images in their order, float32 on the CPU of every process.

    Processes take whole batches in turn, so a batch holds the same images for any number of them. The model goes to the
    accelerator's device and into eval mode.
    """
    loader = validation_loader(accelerator, files, batch_size, num_workers)
    return all_logits(accelerator, model.to(accelerator.device), loader), files.targets.float()


def image_loader(files: ImageFiles, batches: Iterable[list[int]], num_workers: int) -> DataLoader:
    # a generator of its own: starting workers would draw from the one that flips and dropout use
    generator = torch.Generator().manual_seed(0)
    return DataLoader(files, batch_sampler=batches, generator=generator, **loader_options(num_workers))


def validation_loader(accelerator: Accelerator, files: ImageFiles, batch_size: int, num_workers: int) -> DataLoader:
    batches = [batch.tolist() for batch in torch.arange(len(files)).split(batch_size)]
    return image_loader(files, batches[accelerator.process_index :: accelerator.num_processes], num_workers)


@torch.no_grad()
def all_logits(accelerator: Accelerator, model: ArtifactClassifier, loader: DataLoader) -> torch.Tensor:
    """Logits (N, H) of the set behind a `validation_loader`, float32 on the CPU of every process."""
    model.eval()
    table = torch.zeros(len(loader.dataset), len(model.labels), device=accelerator.device)
    for indices, (images, _) in zip(loader.batch_sampler, loader, strict=True):
        pixels = model.preprocess(images.to(accelerator.device, non_blocking=True).float() / 255)
        with accelerator.autocast():
            table[indices] = model(pixels).float()
    return accelerator.reduce(table, "sum").cpu()  # every row comes from one process, the others have zeros there
