"""Sample folders, which eval.py, generate.py and extract_dataset_latents.py write and metric.py reads.

A sample folder has `images/<folder_name of the caption>/<name>.png|jpg`, `settings.json` (so that images of different
settings never mix) and `image_log.json`, a list with an entry per image (at least prompt and path_to_img, relative to
the folder). Processes append a JSON line per image to `image_log.part<rank>.jsonl`; these are merged at the end, even
after a kill.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from ddpo_pytorch.data.images import is_intact
from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.metadata import METADATA, read_metadata
from ddpo_pytorch.utils.cores import thread_limit
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import JsonLines, path_fault, path_inside, write_json
from ddpo_pytorch.utils.json_files import OneOf, check_shape, parse_json, read_json
from ddpo_pytorch.utils.settings import SHARE, check_ranges

SETTINGS = "settings.json"
LOG = "image_log.json"
PARTS = "image_log.part*.jsonl"
WORLD = "world.json"  # in a folder of phantoms
RECORD = "record.json"  # in a rating set (phantoms.rating_sets) with images/
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LONGEST_NAME = 255  # bytes of a file name on common file systems
_SETTINGS_SHAPE = {"settings": dict, "about?": dict}
_ELSEWHERE = "choose another folder or move it away"
# the official scripts log paths from wherever they ran, e.g. /scratch/samples/images/<caption>/0.png
_IMAGE_IN_FOLDER = re.compile(r"(?:.*/)?(images/[^/]+/[^/]+)")


def folder_name(caption: str) -> str:
    """Return the name of a caption's folder; `urllib.parse.unquote(name.replace("_", " "))` returns the caption.

    Spaces become underscores, as in the official code; "_", "/", "\\", unprintable characters, a leading dot, and a "%"
    that looks like an escape become % and the hex digits of their UTF-8 bytes. Names over 255 bytes are truncated; they
    and the empty caption's name end in %FF, which no escape contains, and a hash of the caption.
    """
    pieces = []
    for position, character in enumerate(caption):
        unsafe = character in "_/\\" or not character.isprintable() or (character == "." and position == 0)
        if unsafe or re.match("%[0-9A-Fa-f]{2}", caption[position : position + 3]):
            character = "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
        pieces.append("_" if character == " " else character)
    sizes = list(accumulate(len(piece.encode()) for piece in pieces))
    if pieces and sizes[-1] <= LONGEST_NAME:
        return "".join(pieces)
    ending = "%FF" + hashlib.sha256(caption.encode(errors="surrogatepass")).hexdigest()[:16]
    room = LONGEST_NAME - len(ending)
    return "".join(piece for piece, size in zip(pieces, sizes, strict=True) if size <= room) + ending


_ISIC_FOLDERS = {folder_name(caption): caption for caption in CAPTIONS}


def is_framed(path: Path) -> bool:
    """Return whether an image is in a complete sample folder or a rating set, and so already square for judges."""
    folder = path.parent.parent
    return (folder.parent / LOG).is_file() or (folder / RECORD).is_file()


def claim_folder(folder: str | Path, settings: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Reserve a folder for images of these `settings` (JSON) and record `metadata`. UserError if it holds others."""
    if check_claim(folder, settings):
        return
    if (Path(folder) / "images").is_dir():
        raise UserError(f"{str(folder)!r} holds images but no {SETTINGS}; {_ELSEWHERE}")
    write_json(Path(folder) / SETTINGS, {"settings": settings, "about": metadata})


def check_claim(folder: str | Path, settings: Mapping[str, Any]) -> bool:
    """Return whether a folder is reserved; raise UserError if it is for other settings."""
    old = read_settings(folder)
    if changed := old and difference(old, json.loads(json.dumps(settings))):
        raise UserError(f"{str(folder)!r} was made with {changed}; {_ELSEWHERE}")
    return bool(old)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the recorded settings of a folder's images, or {}. Raises UserError if they cannot be read."""
    path = Path(folder) / SETTINGS
    return read_json(path, _SETTINGS_SHAPE, _ELSEWHERE)["settings"] if path.is_file() else {}


def title_of(name: str, samples: Sequence[tuple[Path, str]]) -> str:
    """Return the title of a set of samples: its name, or "phantoms" for "real" ones from a phantom world."""
    path = samples[0][0].parent.parent.parent / SETTINGS if samples else Path()
    drawn = name == "real" and path.is_file() and read_json(path, _SETTINGS_SHAPE).get("about", {}).get("phantoms")
    return "phantoms" if drawn else name


def write_log(folder: str | Path, entries: list[dict]) -> None:
    """Write `image_log.json` atomically."""
    write_json(Path(folder) / LOG, entries)


def read_log(folder: str | Path) -> list[dict]:
    """Return the entries of `image_log.json`, or [].

    Raises UserError if one has no path_to_img inside the folder, or two differ about the same image.

    Of a path that ends in images/<caption>/<file>, as the official scripts log it, only this end is kept.
    """
    path, text = Path(folder) / LOG, OneOf((str, None))
    shape = [{"path_to_img": str, "prompt?": text, "patient?": text}]
    entries = read_json(path, shape, "make the samples again elsewhere") if path.is_file() else []
    first: dict[str, dict] = {}
    for number, entry in enumerate(entries, 1):
        if match := _IMAGE_IN_FOLDER.fullmatch(entry["path_to_img"]):
            entry["path_to_img"] = match[1]
        path_inside(folder, entry["path_to_img"], f"{str(path)!r} entry {number}")
        if first.setdefault(entry["path_to_img"], entry) != entry:
            problem = f"{str(path)!r} has different entries for {entry['path_to_img']!r}"
            raise UserError(f"{problem}; remove entry {number} or the earlier one")
    return entries


def read_pool(folder: str | Path, setting: str) -> list[dict]:
    """Return the log of a folder of generate.py. Raises UserError, naming `setting`, unless scores are in [0, 1]."""
    entries, where = read_log(folder), f"{setting} {str(folder)!r}"
    advice = "draw it with scripts/generate.py"
    if not entries:
        raise UserError(f"{where} has no {LOG} with images; {advice}")
    scores = dict.fromkeys(("selector", "policy"), float)
    check_shape(entries, [{"prompt": str, "passed": bool, "path_to_img": str, **scores}], where, advice)
    for entry in entries:
        check_ranges(entry, dict.fromkeys(scores, SHARE), f"{where}, {entry['path_to_img']}: ")
    return entries


def part_log(folder: str | Path, rank: int) -> JsonLines:
    """Return one process's part of the log, for entries with at least path_to_img, relative to the folder."""
    return JsonLines(Path(folder) / PARTS.replace("*", str(rank)))


def read_entries(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return the entries of the log and all parts by path_to_img, without those of missing or empty images."""
    folder, listed = Path(folder), read_log(folder)
    for part in filter(Path.is_file, sorted(folder.glob(PARTS))):
        for line in part.read_bytes().split(b"\n"):
            with suppress(UserError):  # a line truncated by a kill; its image counts as missing and is made again
                listed.append(parse_json(line, {"path_to_img": str}, ""))
    entries = {entry["path_to_img"]: entry for entry in listed if not path_fault(entry["path_to_img"])}
    sizes = {path: (folder / path).stat().st_size for path in entries if (folder / path).is_file()}
    return {path: entries[path] for path, size in sizes.items() if size}


def merge_parts(folder: str | Path, order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Write all entries to `image_log.json`, remove the parts and return the entries. Main process only.

    Entries are sorted like their paths in `order`, then by folder and path, and numbered: sampleID 0, 1, ...
    """
    entries, rank = read_entries(folder), {path: number for number, path in enumerate(order)}
    last = {os.path.dirname(path): number for path, number in rank.items()}

    def sort_key(path: str) -> tuple[int, bool, str]:
        return rank.get(path, last.get(os.path.dirname(path), len(rank))), path not in rank, path

    log = [{"sampleID": 0} | entries[path] | {"sampleID": n} for n, path in enumerate(sorted(entries, key=sort_key))]
    write_log(folder, log)
    for part in Path(folder).glob(PARTS):
        part.unlink()
    return log


def damaged_images(folder: str | Path, paths: Sequence[str]) -> list[str]:
    """Return those of `paths`, relative to the folder, whose image is damaged."""
    with ThreadPoolExecutor(thread_limit()) as pool:
        intact = pool.map(is_intact, map(Path(folder).joinpath, paths))
        return [path for path, fine in zip(paths, intact, strict=True) if not fine]


def list_samples(folder: str | Path, prompts: Collection[str] = ()) -> list[tuple[Path, str]]:
    """Return the sorted (file, caption) of a sample folder's images, or those of `prompts`, without hidden files.

    In a folder with a table (`data.metadata`), these are the images listed there. Raises UserError if there are none,
    if a listed image is absent, or for other files and folders in images/.
    """
    root, table = Path(folder) / "images", Path(folder) / METADATA
    if table.is_file():
        listed = [(Path(folder) / row.image, row.caption) for row in read_metadata(table)]
        if absent := [path for path, _ in listed if not path.is_file()]:
            raise UserError(f"{str(table)!r} names {len(absent)} images that are absent, first {str(absent[0])!r}")
        samples = sorted((path, caption) for path, caption in listed if not prompts or caption in prompts)
    elif root.is_dir():
        wanted = [(name, one) for name, one in sorted(_captions_of(folder).items()) if not prompts or one in prompts]
        samples = [(path, caption) for name, caption in wanted for path in sorted((root / name).glob("[!.]*"))]
        unread = [path for path in root.glob("[!.]*") if not path.is_dir()]
        if unread := unread + [path for path, _ in samples if path.suffix.lower() not in IMAGE_SUFFIXES]:
            allowed = f"images/<caption with _ for spaces>/ holds only {', '.join(IMAGE_SUFFIXES)} files"
            raise UserError(f"{str(unread[0])!r} is not read: {allowed}; convert it, or move it away")
    else:
        neither = f"it has neither images/, as scripts/eval.py writes, nor {METADATA} with the columns file_name, text"
        raise UserError(f"{str(folder)!r} is not a sample folder: {neither}; give another folder")
    if not samples:
        wanted = f" of the prompts {sorted(prompts)}" if prompts else ""
        raise UserError(f"{str(folder)!r} holds no images{wanted}; draw them first, or give another folder")
    return samples


def captions_without_images(
    folder: str | Path, samples: Sequence[tuple[Path, str]], prompts: Sequence[str] = ()
) -> list[str]:
    """Return the captions, sorted, of `prompts` or else of a sample folder and its log that have no `samples`."""
    captions = set(prompts) or {entry.get("prompt") for entry in read_log(folder)} - {None}
    if not prompts and not (Path(folder) / METADATA).is_file():
        captions |= set(_captions_of(folder).values())
    return sorted(captions - {caption for _, caption in samples})


def _captions_of(folder: str | Path) -> dict[str, str]:
    """Return the caption of each folder of images by its name: an ISIC caption, else a prompt in the log."""
    names = [path.name for path in (Path(folder) / "images").glob("[!.]*") if path.is_dir()]
    captions = dict(_ISIC_FOLDERS)
    if not captions.keys() >= set(names):
        entries = [entry for entry in read_log(folder) if entry.get("prompt") is not None]
        named = {Path(entry["path_to_img"]).parent.name: entry["prompt"] for entry in entries}
        captions = {folder_name(entry["prompt"]): entry["prompt"] for entry in entries} | named | captions
    if unknown := sorted(set(names) - captions.keys()):
        allowed = "one of the 32 ISIC captions (spaces as underscores), nor after a prompt of image_log.json"
        raise UserError(f"{str(folder)!r}: folder {unknown[0]!r} is not named after {allowed}; rename it")
    return {name: captions[name] for name in names}
