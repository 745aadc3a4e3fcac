"""The networks that look at images for the metrics: judges, feature extractors, LPIPS, image statistics, SSIM.

No package ships the weights of Inception, AlexNet and encoders; without them, `Unavailable` says which option to give.
"""

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import lpips
import numpy as np
import scipy
import timm
import torch
import torchvision.transforms.functional as tvf
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchvision.transforms import InterpolationMode

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, load_judges
from ddpo_pytorch.metrics.feature_store import Network
from ddpo_pytorch.metrics.image_statistics import LOGITS, SETS
from ddpo_pytorch.metrics.ssim import ms_ssim, scale_count, ssim
from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.published import resolve
from ddpo_pytorch.utils.weights import read_tensors

logger = logging.getLogger(__name__)

URL_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# encoder name in metrics.json -> timm architecture and weights
ENCODERS = {f"dinov2_vit{size[0]}14": f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large")}
ENCODERS["clip_vitl14"] = "vit_large_patch14_clip_336.openai"  # CMMD's encoder
URL_ENCODER = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
DINOV2_SIZE = 224
TIMEOUT = 10  # seconds to wait for a server
FID_MODES = ("exact", "compat")  # how images in [0, 1] are quantised to 8 bits for Inception
PAIRS_AT_ONCE = 8  # SSIM needs 60 times the memory of the images
# names of networks
SELECTOR, POLICY = "selector", "policy"
Device = str | torch.device


class Unavailable(Exception):
    """Raised if a network's weights are not available; the message says why and what to do."""


def judge_network(option: str, device: Device = "cpu", name: str = "") -> tuple[Network, Network, tuple[str, ...]]:
    """Load a classifier as two networks, logits (B, H) and pooled features (B, F), and its labels."""
    model, digest = load_classifier(option, device), sha256(resolve(option))
    about = f"of classifier {Path(option).name}, {model.image_size} px"
    logits = _network(name or f"H{len(model.labels)}", f"logits {about}", digest, "logits", model.logits)
    return logits, _network("judge", f"pooled features {about}", digest, "features", model.features), model.labels


def fundus_judges(folder: str | Path, device: Device = "cpu") -> tuple[Network, Network, Network, float]:
    """Load Selector and Policy (which reads captions) as networks of one column, the Selector's features and threshold.

    Raises UserError as `load_judges` does for this folder, and for a Selector without a threshold.
    """
    selector, policy = load_judges(folder, device)
    file = Path(folder) / SELECTOR_FILE
    if selector.threshold is None:
        raise UserError(f"the Selector {str(file)!r} has no threshold; train_rlhf.py sets it in stage 1")
    digest, about = sha256(file), f"Selector of {Path(folder).name}, {selector.sizes.image_size} px"
    what, score = f"{about}, passes from {selector.threshold:.4g}", lambda images: selector.score(images)[:, None]
    passes = _network(SELECTOR, what, digest, "selector", score)
    what, encode = f"encoder of the {about}", lambda images: selector.encoder(selector.preprocess(images))
    features = _network("judge", what, digest, "selector features", encode)
    what, key = f"Policy of {Path(folder).name}, {policy.sizes.image_size} px", f"policy {policy.text.fingerprint}"
    digest, align = sha256(Path(folder) / POLICY_FILE), lambda images, texts: policy.score(images, texts)[:, None]
    return passes, _network(POLICY, what, digest, key, align, reads_captions=True), features, float(selector.threshold)


def inception_network(option: str, mode: str = "exact", device: Device = "cpu", layer: str = "2048") -> Network:
    """Load FID's Inception V3 as torch-fidelity ports it: images (B, 3, H, W) in [0, 1] to 2048 pooled features.

    `layer` "logits_unbiased" returns the logits of its 1008 classes instead. Images are quantised to 8 bits and resized
    to 299 px bilinearly without antialiasing, as in published FIDs; see `official_uint8` for `mode` "compat". Raises
    Unavailable without weights, UserError for a file that does not exist or has other contents.
    """
    path = weight_file(option, URL_INCEPTION_V3, "--config.metric.inception")
    # the extractor unpickles its input, so it gets a safe copy of the tensors instead of the file
    copy = io.BytesIO()
    torch.save(read_tensors(path)[0], copy)
    copy.seek(0)
    with _weights_of(path, "torch-fidelity's Inception V3"):
        network = FeatureExtractorInceptionV3("inception-v3-compat", [layer], copy).to(device)
    name, key, outputs = "inception", f"inception {mode}", "2048 pooled features"
    if layer != "2048":
        name, key, outputs = LOGITS, f"inception {layer} {mode}", "1008 logits without bias"
    quantise = official_uint8 if mode == "compat" else to_uint8
    bits = "x * 256 wrapped to 8 bits as in the official code" if mode == "compat" else "rounded to 8 bits"
    what = f"Inception V3 of FID, {outputs}; 299 px, bilinear, not antialiased (TensorFlow 1); {bits}"
    return _network(name, what, sha256(path), key, lambda x: network(quantise(x.to(device)))[0])


def official_uint8(images: torch.Tensor) -> torch.Tensor:
    """Quantise images in [0, 1] as the official code does: x * 256 wrapped to 8 bits, so that white becomes black."""
    return (images.detach().float() * 256).to(torch.int64).remainder(256).to(torch.uint8)


def encoder_network(name: str, option: str, device: Device = "cpu") -> Network:
    """Load an encoder of `ENCODERS` or of timm that maps images to features; raises as `inception_network` does.

    Images are resized to 224 px for DINOv2, else to the size that timm states. CLIP returns its projected embedding.
    """
    arch = ENCODERS.get(name, name)
    path = weight_file(option, URL_ENCODER.format(arch), "--config.metric.encoders", f"{arch}.safetensors")
    config, options = timm.get_pretrained_cfg(arch), {} if "_clip_" in arch else {"num_classes": 0}
    side = DINOV2_SIZE if "dinov2" in arch else config.input_size[-1]
    if config.fixed_input_size:
        options["img_size"] = side
    with _weights_of(path, f"timm's {arch}"):  # resamples position embeddings, drops the head
        overlay = {"state_dict": read_tensors(path)[0]}
        model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    model.requires_grad_(False).eval().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = tvf.resize(images.to(device), [side, side], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return model(tvf.normalize(pixels, config.mean, config.std))

    return _network(name, f"{arch}; {side} px, bicubic, antialiased", sha256(path), name, features)


def lpips_network(option: str, device: Device = "cpu") -> Network:
    """Load LPIPS (AlexNet, v0.1 layers of the lpips package): two batches to (B, 1). Raises as `inception_network`."""
    path = weight_file(option, URL_ALEXNET, "--config.metric.alexnet")
    state, _ = read_tensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with a deprecated argument
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    with _weights_of(path, "torchvision's AlexNet"):
        # torchvision's features.0.weight is lpips' slice1.0.weight: same layer number, with the slice in front
        model.net.load_state_dict({name: state["features." + name.split(".", 1)[1]] for name in model.net.state_dict()})
    model = model.requires_grad_(False).eval().to(device)
    what, digest = "LPIPS (AlexNet, v0.1), native size", sha256(path)
    return _network("lpips", what, digest, "lpips", lambda x, y: model(x * 2 - 1, y * 2 - 1).flatten(1))


def quality_network(name: str) -> Network:
    """Return a set of `image_statistics.SETS` as a network: (B, 1 + F), 1 and statistics, or zeros without field."""
    columns, measure, about = SETS[name]

    def run(images: torch.Tensor) -> torch.Tensor:
        pictures = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        found = [measure(np.ascontiguousarray(pixels)) for pixels in pictures]
        rows = [[0.0] * (1 + len(columns)) if values is None else [1.0, *values] for values in found]
        return torch.tensor(rows, dtype=torch.float64)

    return Network(f"quality {name}", about, "", f"quality {name} 1 scipy {scipy.__version__}", run)


def similarity_network(name: str, side: int) -> Network:
    """Return "ssim" or "ms_ssim" of two images with a shorter side of `side` pixels as a network with output (B, 1)."""
    function, what = ssim, "SSIM, Gaussian window of 11 px and sigma 1.5"
    if name == "ms_ssim":
        function, scales = ms_ssim, scale_count(side)
        what = f"MS-SSIM, {scales} scales" + (", their exponents scaled to the sum of all five" if scales < 5 else "")

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(PAIRS_AT_ONCE), y.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([function(*part) for part in parts])[:, None]

    return Network(name, what, "", f"{name} 1 torch {torch.__version__}", run)


def weight_file(option: str, url: str, flag: str, name: str = "") -> Path:
    """Resolve a weight option: "auto" uses the torch hub cache, "download" also fetches the url, else it is a path.

    `name`: file name in the cache, or in a folder at that path; by default the url's. Only "download" accesses the
    network. Raises Unavailable if there is no file, UserError for a path that does not exist.
    """
    if not option:
        raise Unavailable(f"{flag} is empty; give 'auto' or the file of {url}")
    if option not in ("auto", "download"):
        if name and Path(option).is_dir():
            option = str(Path(option) / name)
        if not Path(option).is_file():
            raise UserError(f"{flag}={option!r} does not exist; fetch {url}, or give '' to do without")
        return Path(option)
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if option == "download" and not path.is_file() and os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        try:
            urlopen(url, timeout=TIMEOUT).close()  # the download below has no timeout
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = re.search(r"-([0-9a-f]{8,})\.pth$", url)  # PyTorch's names end in the first digits of the sha256
            torch.hub.download_url_to_file(url, str(path), prefix and prefix[1], progress=False)
        except (OSError, RuntimeError) as error:  # no response, or a hash other than the name's
            logger.warning("%s cannot be fetched (%s)", url, one_line(error, 150))
    if not path.is_file():
        online = f"{flag}=download with internet access"
        raise Unavailable(f"no weights in {path.parent}; fetch {url} and give {flag}=FILE, or {online}")
    return path


@contextmanager
def _weights_of(path: Path, network: str) -> Iterator[None]:
    """Turn errors about weights that do not fit into a UserError."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{str(path)!r} does not fit {network} ({one_line(error, 150)}); give another file") from error


def _network(name: str, what: str, digest: str, preprocessing: str, run: Callable, **options: bool) -> Network:
    """Return a network with a key of its preprocessing and the hash of its weights."""
    return Network(name, what, digest, f"{preprocessing} {digest} torch {torch.__version__}", run, **options)
