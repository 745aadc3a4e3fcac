"""Sets of image files to be measured: found, checked before anything is computed, and known by their content.

A *model* is a column of the tables: one sample folder, or several that differ in nothing but their generation seed.
"""

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import gather_object

from ddpo_pytorch.data.images import SUFFIXES, open_image
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import captions_without_images, list_samples, read_log, read_settings
from ddpo_pytorch.metrics.vocabulary import vocabulary_of
from ddpo_pytorch.utils.cli import expand
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256

logger = logging.getLogger(__name__)

MODE = "RGB"


@dataclass(frozen=True)
class ImageSet:
    """A folder's images in their order: files, captions ("" where none is known) and SHA-256 of each file.

    `entries` holds the lines of its image_log.json by path relative to the folder, `made_with` its settings;
    `vocabulary` are the captions of all sets of the report; `lacking` those of this folder without an image.
    """

    folder: Path
    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]
    entries: Mapping[str, Mapping] = field(default_factory=dict)
    made_with: Mapping = field(default_factory=dict)
    vocabulary: tuple[str, ...] = CAPTIONS
    lacking: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def keys(self) -> list[str]:
        """Name of each image within its folder, without suffix: "<caption>/<stem>"; the same noise has the same key."""
        return [f"{caption}/{path.stem}" for caption, path in zip(self.captions, self.paths, strict=True)]

    @property
    def samples(self) -> list[tuple[Path, str]]:
        """(file, caption) of every image."""
        return list(zip(self.paths, self.captions, strict=True))

    @property
    def groups(self) -> list[int]:
        """Number of each image's caption in the vocabulary."""
        numbers = {caption: number for number, caption in enumerate(self.vocabulary)}
        return [numbers[caption] for caption in self.captions]

    def entry(self, index: int) -> Mapping:
        """The log's line about an image; {} where there is none."""
        return self.entries.get(str(self.paths[index].relative_to(self.folder)), {})

    def about(self) -> dict:
        """What metrics.json states about the set, but for what needs its pixels."""
        content = sorted(f"{key} {digest}" for key, digest in zip(self.keys, self.digests, strict=True))
        counts = Counter(self.captions)
        return {
            "path": str(self.folder),
            "images": len(self),
            "sha256": hashlib.sha256("\n".join(content).encode()).hexdigest(),
            "images_by_prompt": {caption: counts.get(caption, 0) for caption in self.vocabulary},
        }


def named_paths(text: str, field_name: str) -> list[tuple[str, str]]:
    """(name, path) pairs of "SD=a,SD=b,SD+RL=c". Raises UserError for a part without name or path."""
    pairs = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, path = (piece.strip() for piece in part.partition("="))
        if not name or not path:
            raise UserError(f"{part!r} in {field_name}={text!r} is not NAME=PATH; separate several by commas")
        pairs.append((name, expand(path)))
    return pairs


def caption_files(folder: str | Path, prompts: Sequence[str]) -> tuple[Path, list[tuple[Path, str]]]:
    """The images of a sample folder with their captions (see `list_samples`, whose errors it raises)."""
    return Path(folder), list_samples(folder, prompts)


def any_files(folder: str | Path) -> tuple[Path, list[tuple[Path, str]]]:
    """Every image at or below a folder, without captions. Raises UserError where there is none."""
    folder, files, seen = Path(folder), [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        found = [Path(place, name) for name in names if name[0] != "."]
        files += [path for path in found if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{str(folder)!r} is no folder with images; give one with {', '.join(SUFFIXES)} files")
    return folder, [(path, "") for path in sorted(files)]


def inspected(
    found: Iterable[tuple[Path, list[tuple[Path, str]]]], rank: int, processes: int, prompts: Sequence[str] = ()
) -> list[ImageSet]:
    """Check every file's header and hash its content, shared among processes; returns the sets to all of them.

    Nothing is computed before this has passed: all images have one size and are RGB, so that sets which were resized
    differently, or of which a part is grey or transparent, are not compared unnoticed. Raises UserError naming the
    first faulty file and how many there are.
    """
    found = list(found)
    files = [path for _, samples in found for path, _ in samples]
    looked = gather_object([(number, *_look(files[number])) for number in range(rank, len(files), processes)])
    facts = {number: rest for number, *rest in looked}
    faults = [fault for _, fault, *_ in (facts[number] for number in range(len(files))) if fault]
    sizes = [facts[number][2] for number in range(len(files))]
    usual = Counter(sizes).most_common(1)[0][0]
    if not faults:
        faults = [
            f"{str(path)!r} is {width} x {height} px, most images are {usual[0]} x {usual[1]}; metrics compare images "
            "of one size: write the real images at the size of the generated ones (--config.dataset.image_size)"
            for path, (width, height) in zip(files, sizes, strict=True)
            if (width, height) != usual
        ]
    if faults:
        more = f" ({len(faults) - 1} more files have such a fault)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    digests, sets = iter(facts[number][0] for number in range(len(files))), []
    vocabulary = vocabulary_of(caption for _, samples in found for _, caption in samples)
    for folder, samples in found:
        paths, captions = zip(*samples, strict=True)
        entries = _logged(folder, samples) if any(captions) else {}
        lacking = captions_without_images(folder, samples, prompts) if any(captions) else ()
        own = tuple(next(digests) for _ in samples)
        sets.append(ImageSet(folder, paths, captions, own, entries, read_settings(folder), vocabulary, tuple(lacking)))
    return sets


def _logged(folder: Path, samples: Sequence[tuple[Path, str]]) -> dict[str, dict]:
    """Lines of image_log.json by path. Raises UserError where they contradict the files."""
    log = read_log(folder)
    for number, entry in enumerate(log):
        if not isinstance(entry.get("path_to_img"), str):
            raise UserError(f"{str(folder / 'image_log.json')!r}: entry {number} has no path_to_img; remove it")
    entries = {entry["path_to_img"]: entry for entry in log}
    captions, stems = {str(path.relative_to(folder)): caption for path, caption in samples}, {}
    for path, caption in samples:
        if (caption, path.stem) in stems:
            raise UserError(f"{str(stems[caption, path.stem])!r} and {str(path)!r} share a name; keep one of them")
        stems[caption, path.stem] = path
    for path, entry in entries.items():
        where = f"{str(folder / 'image_log.json')!r}, {path}"
        if path in captions and entry.get("prompt") not in (None, captions[path]):
            raise UserError(f"{where}: the prompt {entry['prompt']!r} is not that of its folder; correct one of them")
        try:
            fine = entry.get("reward") is None or math.isfinite(float(entry["reward"]))
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise UserError(f"{where}: the reward {entry['reward']!r} is no finite number; remove it or draw again")
    if absent := [path for path in entries if not (folder / path).is_file()]:
        logger.warning("%s: image_log.json lists %d images that are absent, first %s", folder, len(absent), absent[0])
    return entries


def _look(path: Path) -> tuple[str, str, tuple[int, int]]:
    """Return SHA-256, fault or "", and (width, height) of a file, from its bytes and its header."""
    try:
        with open_image(path) as image:
            mode, size, transparent = image.mode, image.size, "transparency" in image.info
        digest = sha256(path)
    except UserError as error:
        return "", str(error), (0, 0)
    if mode != MODE or transparent:
        mode = f"{mode} with transparency" if transparent else mode
        return digest, f"{str(path)!r} has mode {mode}, not {MODE}; convert it to RGB without transparency", size
    return digest, "", size


def shape_of(images: ImageSet) -> tuple[int, int]:
    """(height, width) in pixels, which `inspected` has made sure is the same for all."""
    with open_image(images.paths[0]) as image:
        return image.size[1], image.size[0]
