"""The published files and the official split tables: what they are called, and where they come from.

The official README and configuration spell two names differently; both spellings are accepted.
"""

import hashlib
import http.client
import logging
import urllib.request
from pathlib import Path
from typing import NamedTuple

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, sha256

logger = logging.getLogger(__name__)

ARCHIVE = "images.zip"
DRIVE_ID = "1ah15Yu5Iu7kXdSM649yKhqCLDhqol0ef"
DRIVE_URL = f"https://drive.google.com/drive/folders/{DRIVE_ID}"

# README's spelling, configuration's spelling
SPELLINGS = (
    ("rl4med-checkpoint50", "rl4med-checkpoint_50"),
    ("artifact_classifier_train_H4", "artifact_classifier_test_H4"),
)


class PublishedFile(NamedTuple):
    """An entry of the Drive folder, by README's spelling."""

    name: str
    what: str
    required: bool = True


FILES = (
    PublishedFile("artifact_classifier_train_H6.pth", "reward classifier"),
    PublishedFile("artifact_classifier_train_H4.pth", "judge"),
    PublishedFile("rl4med-checkpoint50", "LoRA of stage (ii)"),
    PublishedFile("pretrained_unet.safetensors", "UNet of stage (i)"),
    PublishedFile(ARCHIVE, "generated samples", required=False),
)

SPLITS_URL = "https://raw.githubusercontent.com/parhamsaremi/rl4med-ddpo/main/splits"
# sha256 by name
SPLITS = {
    "isic2019_train.csv": "9b573686e740b0bf49beb36458fc30367b3757eee1fa355435eac24c0280274b",
    "isic2019_val.csv": "7300aa82b8a932a69a3b547b2c806b28236c9ac17dfda4bb629946e37531288f",
    "isic2019_test.csv": "f79b6bdab6129e52efea348ee9f74bd7980960e3468f827eb02205584e2dea1e",
}
TIMEOUT = 30  # seconds without an answer


def resolve(path: str | Path) -> Path:
    """`path`, or, where nothing is there, the same under the other published spelling if that exists."""
    path = Path(path).expanduser()
    for pair in SPELLINGS:
        for ours, other in (pair, pair[::-1]):
            alternative = Path(str(path).replace(ours, other))
            if not path.exists() and alternative.exists():
                logger.info("%s is not there; taking %s", path, alternative)
                return alternative
    return path


def spellings(name: str) -> tuple[str, ...]:
    """Names under which a file of `FILES` may lie: README's, then the other one if there is one."""
    return (name, *(name.replace(ours, other) for ours, other in SPELLINGS if ours in name))


def fetch_split(name: str, folder: Path, base_url: str = SPLITS_URL) -> Path:
    """Fetch one split table of `SPLITS` into `folder`; return the file. A correct one that is there is kept.

    Raises:
        UserError: another file has that name already (it is left alone), no answer, or not the official content; then
            nothing is written.
    """
    target, url = folder / name, f"{base_url}/{name}"
    if target.exists():
        digest = sha256(target)
        if digest != SPLITS[name]:
            raise UserError(
                f"{target} is not the official table (its sha256 is {digest}, expected {SPLITS[name]}) and is not "
                "overwritten; move it away, then run this again"
            )
        logger.info("%s is there already", target)
        return target
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched ({error}); save it with a browser as {target}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SPLITS[name]:
        raise UserError(
            f"{url} gave another content than the official table (sha256 {digest}, expected {SPLITS[name]}), which was "
            f"not saved; see what your network answers there, or save the official table as {target}"
        )
    with atomic_write(target) as temporary:
        temporary.write_bytes(content)
    logger.info("%s fetched, sha256 as expected", target)
    return target
