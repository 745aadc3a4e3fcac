"""The two public networks behind FID and LPIPS, from weight files that may have to be fetched first.

Neither file is part of a package: where it cannot be had, loading returns None after one log line that names the
option, and the metric is reported as n/a.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import lpips
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.errors import UserError

logger = logging.getLogger(__name__)

URL_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# seconds to wait for the server; without a network the metrics go on instead of hanging.
TIMEOUT = 10


def inception_features(
    option: str, device: str | torch.device = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Function from images (B, 3, H, W) in [0, 1] to the 2048 pooled features of FID's Inception V3, or None.

    It is torch-fidelity's port: quantised to 8 bits, resized to 299 px bilinearly without antialiasing as TensorFlow 1
    did, i.e. the features behind published FIDs (torchmetrics now resizes with antialiasing, which gives others).
    """
    path = weight_file(option, URL_INCEPTION_V3, "FID", "--config.metric.inception")
    if path is None:
        return None
    _plain_tensors(path)  # the extractor unpickles the file itself: let through only what needs no unpickling
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} are not torch-fidelity's Inception V3 weights ({_short(error)})") from error

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return network(to_uint8(images.to(device)))[0]

    return features


def lpips_distance(option: str, device: str | torch.device = "cpu") -> nn.Module | None:
    """LPIPS (AlexNet, v0.1 linear layers, which the lpips package ships) on images in [-1, 1], or None."""
    path = weight_file(option, URL_ALEXNET, "LPIPS", "--config.metric.alexnet")
    if path is None:
        return None
    state = _plain_tensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an argument of 2021
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        # torchvision's features.0.weight is lpips' slice1.0.weight: the layer number stays, the slice is put before it
        trunk = {name: state["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
        model.net.load_state_dict(trunk)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} are not torchvision's AlexNet weights ({_short(error)})") from error
    return model.requires_grad_(False).eval().to(device)


def weight_file(option: str, url: str, metric: str, flag: str) -> Path | None:
    """The file that an option names: "" is none, "auto" the torch hub cache or a download, else a path.

    Raises UserError for a path that does not exist.
    """
    if not option:
        logger.info("%s is n/a: %s is empty", metric, flag)
        return None
    if option != "auto":
        if not Path(option).is_file():
            raise UserError(f"{flag}={option!r} does not exist; fetch {url}, or give '' to leave {metric} out")
        return Path(option)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file() or _download(url, path):
        return path
    logger.info(
        "%s is n/a: no weights in %s and no download; fetch %s and give %s=FILE", metric, path.parent, url, flag
    )
    return None


def _download(url: str, path: Path) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        urlopen(url, timeout=TIMEOUT).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (URLError, OSError):
        return False
    return True


def _plain_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{str(path)!r} is not a file of plain tensors ({_short(error)}); fetch it again") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
