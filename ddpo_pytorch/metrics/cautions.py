"""What a reader of the numbers has to know, as lines; and why a number is missing."""

from collections.abc import Mapping, Sequence

import numpy as np

from ddpo_pytorch.metrics.comparison import different_settings
from ddpo_pytorch.metrics.evaluation import Context, Folder, mean_reward
from ddpo_pytorch.metrics.vocabulary import in_order, lacking_images, listed

# fewer images than Inception has features: its covariance is singular, and FID's bias large
FEW_IMAGES = 2048
# of a set of images: field of `set_facts`, and what it says
COUNTS = {
    "black_images": "black",
    "identical_images": "equal to another one to the pixel",
    "copies_of_training_images": "training images to the pixel",
    "near_copies_of_training_images": "copies or near copies (by thumbnail) of training images",
    "copies_of_real_images": "images of the real folder to the pixel",
}


def warnings_of(
    context: Context, folders: Mapping[str, Sequence[Folder]], facts: Mapping[int, Mapping], parts: Sequence[np.ndarray]
) -> list[str]:
    """Lines about sets that differ, overlap, are small or hold faulty images.

    `facts`: `set_facts` by id of the folder. `parts`: indices of the matched images of the real and every other set.
    """
    every = [folder for own in folders.values() for folder in own]
    found = [*_of_real(context, every, parts), *_of_prompts(context, folders)]
    sides = [context.real] if context.real is not None else []
    for images in (side.images for side in [*sides, *(folder.side for folder in every)]):
        if images.lacking:
            found.append(lacking_images(images.folder, images.lacking))
    counts = sorted({len(folder.side.images) for folder in every})
    if len(counts) > 1:
        found.append(f"sets hold {' and '.join(map(str, counts))} images: unmatched distances do not compare")
    for folder in every:
        if folder is not every[0]:
            found += different_settings(every[0].side, folder.side)
        about = facts[id(folder)]
        for key, what in COUNTS.items():
            if about.get(key):
                found.append(f"{about['path']}: {about[key]} of {about['images']} images {_are(about[key])} {what}")
    for number, folder in enumerate(every):
        for other in every[:number]:
            if facts[id(folder)]["sha256"] == facts[id(other)]["sha256"]:
                found.append(f"{folder.side.images.folder} and {other.side.images.folder} hold the same images")
    return found


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _of_real(context: Context, every: Sequence[Folder], parts: Sequence[np.ndarray]) -> list[str]:
    real, found = context.real, []
    if real is None:
        return found
    if context.train is not None and (near := context.near_copies()).any():
        first = real.images.paths[int(near.argmax())]
        found.append(
            f"{near.sum()} of {len(near)} real images {_are(near.sum())} copies or near copies of training images, the "
            f"first is {first}; they are left out where real images tell how near is near, but not elsewhere"
        )
    asked = {caption for folder in every for caption in folder.side.images.captions}
    lacking = in_order(asked - set(real.images.captions))
    if lacking:
        found.append(
            f"{real.images.folder} has no image of {len(lacking)} generated captions, which count in {context.key} but "
            f"not in LPIPS nor in matched distances: {listed(lacking)}"
        )
    count = len(parts[0])
    if count < 2:
        found.append(f"there are no matched distances: all sets together share {count} images of the same captions")
    elif "inception" in context.extractors and count < FEW_IMAGES:
        found.append(
            f"matched distances rest on {count} images a set; below {FEW_IMAGES}, as many as FID has features, FID is "
            "biased upwards and comparable at equal numbers only; KID is not biased"
        )
    elif count < FEW_IMAGES:
        found.append(
            f"matched distances rest on {count} images a set: Frechet distances of few images are biased upwards and "
            "comparable at equal numbers only; KID is not biased"
        )
    return found


def _of_prompts(context: Context, folders: Mapping[str, Sequence[Folder]]) -> list[str]:
    held = {name: {c for folder in own for c in folder.side.images.captions} for name, own in folders.items()}
    asked, found = set().union(*held.values()), []
    for name, captions in held.items():
        if lacking := in_order(asked - captions):
            found.append(
                f"{name} has no images of {len(lacking)} captions that others have, which count in the others' "
                f"{context.key} but not in matched distances: {listed(lacking)}"
            )
    return found


def missing_of(own: Sequence[Folder], context: Context) -> dict[str, str]:
    """Why a model lacks numbers that the settings allow, by their block."""
    found = {}
    if not any(block for block in own[0].result["diversity"].values()):
        found["diversity"] = "no caption has two images in every folder"
    if context.real is not None and not set(own[0].side.images.captions) & set(context.real.images.captions):
        found["LPIPS"] = found["fidelity"] = "no caption is shared with the real images"
    if all(mean_reward(folder) is None for folder in own):
        found["reward"] = "image_log.json states no rewards"
    return found
