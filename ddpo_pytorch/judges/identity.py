"""What two trainings of a classifier have to share to be one and the same."""

import hashlib
import json
from pathlib import Path

from torch import nn

from ddpo_pytorch.data.images import ImageFiles


def weights_digest(model: nn.Module) -> str:
    """Hash of all weights and their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def images_digest(files: ImageFiles) -> str:
    """Hash of the images' names, labels, size and way of resizing, wherever they lie; not of their pixels."""
    files = getattr(files, "files", files)  # those behind a cache
    about = [files.size, files.resize, [Path(path).name for path in files.paths], files.targets.tolist()]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
