"""The networks that see images for the metrics, from weight files that may have to be fetched first.

Inception, AlexNet and DINOv2 are part of no package: where their weights cannot be had, `Unavailable` says why and
names the option, and the caller goes on with the other metrics.
"""

import hashlib
import io
import logging
import os
import re
import warnings
from pathlib import Path
from urllib.request import urlopen

import lpips
import timm
import torch
import torchvision.transforms.functional as tvf
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.transforms import InterpolationMode

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.judges.classifier import IMAGENET_MEAN, IMAGENET_STD, load_classifier
from ddpo_pytorch.metrics.feature_store import Network
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

logger = logging.getLogger(__name__)

URL_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
URL_DINOV2 = f"https://huggingface.co/timm/{DINOV2}/resolve/main/model.safetensors"
DINOV2_SIZE = 224
# seconds to wait for the server; without a network the metrics go on instead of hanging.
TIMEOUT = 10
# how images in [0, 1] become the 8 bits that Inception sees
FID_MODES = ("exact", "compat")
LOGITS = "inception logits"
Device = str | torch.device


class Unavailable(Exception):
    """A network whose weights cannot be had here; the text says why and what to do."""


def judge_network(name: str, option: str, device: Device = "cpu") -> tuple[Network, Network, tuple[str, ...]]:
    """A classifier as two networks, `name` giving logits (B, H) and "features" the pooled features; and its labels.

    Raises UserError as `load_classifier` does.
    """
    model = load_classifier(option, device)
    digest, where = sha256(resolve(option)), f"classifier {Path(option).name}, {model.image_size} px"
    logits = Network(name, f"logits of {where}", digest, key_of("logits", digest), model.logits)
    features = Network("judge", f"pooled features of {where}", digest, key_of("features", digest), model.features)
    return logits, features, model.labels


def inception_network(option: str, mode: str = "exact", device: Device = "cpu", layer: str = "2048") -> Network:
    """FID's Inception V3 as torch-fidelity ports it: images (B, 3, H, W) in [0, 1] to 2048 pooled features.

    `layer` "logits_unbiased" gives the logits of its 1008 classes in their place, under the name "inception logits".
    Images are quantised to 8 bits and resized to 299 px bilinearly without antialiasing as TensorFlow 1 did, i.e. the
    features behind published FIDs (torchmetrics now resizes with antialiasing, which gives others). `mode` "exact"
    rounds; "compat" repeats the official code's x * 256 cut to 8 bits, in which pure white becomes black.

    Raises:
        Unavailable: no weights.
        UserError: a file that does not exist or holds something else.
    """
    if mode not in FID_MODES:
        raise UserError(f"metric.fid is {mode!r}; allowed are {', '.join(FID_MODES)}")
    path = weight_file(option, URL_INCEPTION_V3, "--config.metric.inception")
    # the extractor unpickles what it is given, with all that a pickle may do: it gets bytes written here, not the file
    copy = io.BytesIO()
    torch.save(read_tensors(path)[0], copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", [layer], copy).to(device)
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} are not torch-fidelity's Inception V3 weights ({_short(error)})") from error
    quantise = to_uint8 if mode == "exact" else official_uint8
    name, key, outputs = ("inception", f"inception {mode}", "2048 pooled features")
    if layer != "2048":
        name, key, outputs = (LOGITS, f"inception {layer} {mode}", "1008 logits without bias")
    what = f"Inception V3 of FID, {outputs}; 299 px, bilinear, not antialiased (TensorFlow 1)"
    what += "; x * 256 wrapped to 8 bits as officially" if mode == "compat" else "; rounded to 8 bits"
    digest = sha256(path)
    return Network(name, what, digest, key_of(key, digest), lambda x: network(quantise(x.to(device)))[0])


def official_uint8(images: torch.Tensor) -> torch.Tensor:
    """The official metric.py's quantisation of images in [0, 1]: x * 256 cut to an integer, of which 256 wraps to 0."""
    return (images.detach().float() * 256).to(torch.int64).remainder(256).to(torch.uint8)


def dinov2_network(option: str, device: Device = "cpu") -> Network:
    """DINOv2 (ViT-S/14, timm): images (B, 3, H, W) in [0, 1] to the 384 features of the class token.

    Resized to 224 px bicubically with antialiasing, ImageNet-normalised. Raises as `inception_network`.
    """
    path = weight_file(option, URL_DINOV2, "--config.metric.dinov2", f"{DINOV2}.safetensors")
    state, _ = read_tensors(path)
    try:
        model = timm.create_model(DINOV2, pretrained=False, num_classes=0, img_size=DINOV2_SIZE)
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, model)  # resamples position embeddings
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{str(path)!r} are not timm's {DINOV2} weights ({_short(error)})") from error
    model.requires_grad_(False).eval().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        size = [DINOV2_SIZE, DINOV2_SIZE]
        pixels = tvf.resize(images.to(device), size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return model(tvf.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))

    digest = sha256(path)
    what = f"DINOv2 ({DINOV2}), class token; {DINOV2_SIZE} px, bicubic, antialiased"
    return Network("dinov2", what, digest, key_of("dinov2", digest), features)


def lpips_network(option: str, device: Device = "cpu") -> Network:
    """LPIPS (AlexNet, v0.1 linear layers, which the lpips package ships): two (B, 3, H, W) in [0, 1] to (B, 1).

    Images keep their size. Raises as `inception_network`.
    """
    path = weight_file(option, URL_ALEXNET, "--config.metric.alexnet")
    state, _ = read_tensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an argument of 2021
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        # torchvision's features.0.weight is lpips' slice1.0.weight: the layer number stays, the slice is put before it
        trunk = {name: state["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
        model.net.load_state_dict(trunk)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} are not torchvision's AlexNet weights ({_short(error)})") from error
    model = model.requires_grad_(False).eval().to(device)
    digest = sha256(path)
    return Network(
        "lpips", "LPIPS (AlexNet, v0.1), native size", digest, key_of("lpips", digest), lambda x, y: _lpips(model, x, y)
    )


def _lpips(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return model(x * 2 - 1, y * 2 - 1).flatten(1)


def weight_file(option: str, url: str, flag: str, name: str = "") -> Path:
    """The file that an option names: "" is none, "auto" the torch hub cache, "download" that or the url, else a path.

    `name` is that of the file in the cache, by default the url's. No network is used unless the option asks for it.
    Raises Unavailable where there is none, UserError for a path that does not exist.
    """
    if not option:
        raise Unavailable(f"{flag} is empty; give 'auto' or the file of {url}")
    if option not in ("auto", "download"):
        if not Path(option).is_file():
            raise UserError(f"{flag}={option!r} does not exist; fetch {url}, or give '' to do without")
        return Path(option)
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if path.is_file() or (option == "download" and _download(url, path)):
        return path
    if option == "download":
        raise Unavailable(f"no weights in {path.parent} and no download; fetch {url} and give {flag}=FILE")
    raise Unavailable(f"no weights in {path.parent}; fetch {url} and give {flag}=FILE, or let {flag}=download fetch it")


def _download(url: str, path: Path) -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    try:
        urlopen(url, timeout=TIMEOUT).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        # PyTorch's habit: a file's name ends in the first digits of its sha256
        prefix = re.search(r"-([0-9a-f]{8,})\.pth$", url)
        torch.hub.download_url_to_file(url, str(path), prefix and prefix[1], progress=False)
    except (OSError, RuntimeError) as error:  # no answer, or other content than the name says
        logger.warning("%s cannot be fetched (%s)", url, _short(error))
        return False
    return True


def key_of(preprocessing: str, digest: str) -> str:
    """A network's key: what it does to images, and the hash of its weights."""
    return hashlib.sha256(f"{preprocessing} {digest} torch {torch.__version__}".encode()).hexdigest()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
