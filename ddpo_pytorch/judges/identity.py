"""What two trainings of a classifier have to share to be one and the same."""

import hashlib

from torch import nn

from ddpo_pytorch.data.images import ImageFiles


def weights_digest(model: nn.Module) -> str:
    """Hash of all weights and their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def images_digest(files: ImageFiles) -> str:
    """Digest of the images, also of those behind a cache."""
    return getattr(files, "files", files).digest()
