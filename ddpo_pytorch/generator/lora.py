"""LoRA adapters of the UNet (Hu et al. 2021): W x + up(down(x)), added, trained, saved and loaded.

`down` (lora_A) has shape (rank, in), `up` (lora_B) shape (out, rank). The scale alpha / rank is 1, as in the published
checkpoint, and adapter weights are float32 whatever the UNet's dtype is. All functions take the bare UNet; unwrap it
(`accelerator.unwrap_model`) first.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import OneOf, parse_json
from ddpo_pytorch.utils.weights import read_tensors

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # its projections
FILE_NAME = "pytorch_lora_weights.safetensors"
# What a folder may hold, newest format first.
FILE_NAMES = (FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
# Attention-processor files (diffusers < 0.22) name the layer after the projection that it corrects.
LEGACY_KEY = re.compile(
    r"(?P<attention>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<half>down|up)\.weight"
)
# peft, with the adapter's name in the middle or without; diffusers' training scripts; kohya's, of modules whose dots
# have become underscores.
PEFT_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B)(\.(?P<adapter>[^.]+))?\.weight")
DIFFUSERS_KEY = re.compile(r"(?P<module>.+)\.lora\.(?P<half>down|up)\.weight")
KOHYA_KEY = re.compile(r"lora_unet_(?P<module>[^.]+)\.lora_(?P<half>down|up)\.weight")
ALPHA_KEY = re.compile(r"(lora_unet_)?(?P<module>.+?)(\.lora)?\.alpha")
TEXT_ENCODER_KEY = re.compile(r"text_encoder(_2)?\.|lora_te\d?_")
HALVES = {"down": "A", "up": "B"}
PREFIX = re.compile(r"(base_model\.model\.)?(unet\.)?")


def add_lora(unet: UNet2DConditionModel, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add trainable adapters to every UNet layer whose name ends in one of `targets`; freeze everything else.

    `down` is normal with standard deviation 1 / rank, `up` is zero, so the UNet's output does not change yet. The same
    seed gives the same weights on every device and in every process.

    Raises:
        UserError: rank below 1, a target that names no layer, or the UNet has adapters already.
    """
    if rank < 1:
        raise UserError(f"LoRA rank is {rank}; allowed is 1 or more (the published checkpoint has 4)")
    if has_lora(unet):
        raise UserError("the UNet has LoRA adapters already; load weights into them, or start from a fresh UNet")
    if not targets:
        raise UserError("LoRA targets are empty, so nothing would be trained; name endings such as to_q, to_k, to_v")
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"LoRA target {target!r} names no linear or convolutional layer of the UNet; "
                "use endings such as to_q, to_k, to_v, to_out.0"
            )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    unet.add_adapter(config, adapter_name=ADAPTER)

    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(_adapter_weights(unet).items()):
        # peft follows the dtype of the frozen layer; half precision would swallow small updates.
        parameter.data = parameter.data.float()
        if ".lora_A." in key:
            noise = torch.randn(parameter.shape, generator=generator) / rank
            parameter.data.copy_(noise)
        else:
            parameter.data.zero_()


def has_lora(unet: nn.Module) -> bool:
    """Whether the UNet has adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in unet.modules())


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The adapters' weights, float32, in the order of the UNet's modules."""
    return list(_adapter_weights(unet).values())


def lora_state_dict(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the adapters' weights on the CPU, under the keys of `save_lora`: unet.<module>.lora_{A,B}.weight."""
    return {f"unet.{key}": value.detach().cpu().clone().contiguous() for key, value in _adapter_weights(unet).items()}


def adapter_fingerprint(unet: nn.Module) -> str:
    """Return the fingerprint of the adapters' weights; "" for a UNet without."""
    return fingerprint(lora_state_dict(unet)) if has_lora(unet) else ""


def save_lora(unet: nn.Module, path: str | Path) -> Path:
    """Write the adapters in the format that diffusers' `load_lora_weights` reads; return the file.

    Args:
        path: a file ending in .safetensors, or a folder (made if absent), in which pytorch_lora_weights.safetensors is
            written. The file appears complete or not at all.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    with atomic_write(file) as temporary:
        save_file(lora_state_dict(unet), temporary, metadata={"format": "pt"})
    return file


def load_lora(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Load adapters from a file, or from the file that a folder holds, adding them first when the UNet has none.

    Reads legacy attention-processor files (the published checkpoint), peft's, those of diffusers' training scripts and
    kohya's, .safetensors or .bin, with or without the prefixes "unet." and "base_model.model.". A scale alpha / rank
    other than 1, as files may state, is multiplied into `up`. Weights of the UNet change only if the whole file fits.

    Raises:
        UserError: no such file; one that `read_tensors` refuses; a key that is not understood or names no module of the
            UNet, or that of a text encoder; adapters of the UNet that the file lacks; a wrong shape or rank (key and
            both shapes are named).
    """
    file = _find_file(Path(path).expanduser())
    tensors, metadata = read_tensors(file)
    weights, sources, alphas = _rename(tensors, unet, file)
    scale = _scale(file, metadata)
    if has_lora(unet):
        expected = {key: tuple(parameter.shape) for key, parameter in _adapter_weights(unet).items()}
    else:
        expected = _expected_shapes(unet, weights, sources, file)
        if any(".processor." in source for source in sources.values()):
            _check_every_attention(unet, expected, file)
    for key, weight in weights.items():
        if key not in expected:
            raise UserError(f"{file}: {sources[key]} belongs to no adapter of the UNet; check train.lora_targets")
        if tuple(weight.shape) != expected[key]:
            raise UserError(
                f"{file}: {sources[key]} has shape {tuple(weight.shape)}, the UNet's adapter wants {expected[key]}; "
                "use the same base model and train.lora_rank"
            )
    missing = next((key for key in expected if key not in weights), None)
    if missing is not None:
        raise UserError(f"{file} lacks {missing}, which the UNet's adapters need; check train.lora_targets")

    if not has_lora(unet):
        modules = {key.rpartition(".lora_")[0] for key in weights}
        rank = next(weight.shape[0] for key, weight in weights.items() if ".lora_A." in key)
        add_lora(unet, rank, sorted(modules), seed=0)
    with torch.no_grad():
        for key, parameter in _adapter_weights(unet).items():
            module, half = key.rsplit(".lora_", 1)
            own = alphas[module] / len(weights[f"{module}.lora_A.weight"]) if module in alphas else scale
            parameter.copy_(weights[key].float() * (own if half == "B.weight" else 1.0))


@torch.no_grad()
def merged_state_dict(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Copies on the CPU of the UNet's weights in diffusers' names, adapters added to them: W + up down, in float32.

    Half precision would round most of a small correction away.
    """
    layers = {f"{name}.weight": layer for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)}
    state = {}
    for name, value in unet.state_dict().items():
        if ".lora_" not in name:
            name = name.replace(".base_layer.", ".")
            merged = value.float() + layers[name].get_delta_weight(ADAPTER).float() if name in layers else value
            state[name] = merged.detach().float().cpu().clone().contiguous()
    return state


@contextmanager
def disabled_lora(unet: nn.Module) -> Iterator[None]:
    """Within this context the UNet is the base model: a free reference for the KL divergence."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    # peft freezes what it disables and unfreezes what it enables; the caller's choice has to survive both.
    trainable = [(parameter, parameter.requires_grad) for parameter in lora_parameters(unet)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def _adapter_weights(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter weights by <module>.lora_{A,B}.weight, the names that every file is translated to."""
    marker = f".{ADAPTER}.weight"
    return {
        name.replace(marker, ".weight"): parameter
        for name, parameter in unet.named_parameters()
        if ".lora_" in name and name.endswith(marker)
    }


def _find_file(path: Path) -> Path:
    candidates = [path / name for name in FILE_NAMES] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        where = f"in {path}; a folder must hold one of {', '.join(FILE_NAMES)}" if path.is_dir() else f"at {path}"
        raise UserError(f"no LoRA weights {where}; give a checkpoint folder or a .safetensors or .bin file that exists")
    return file


def _rename(
    tensors: dict[str, torch.Tensor], unet: nn.Module, file: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, float]]:
    """Return tensors by <module>.lora_{A,B}.weight, the key that the file uses for each, and alpha by module."""
    weights: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    alphas: dict[str, float] = {}
    modules = {name.replace(".", "_"): name for name, _ in unet.named_modules()}  # kohya's names of them
    for source, tensor in tensors.items():
        key = source[PREFIX.match(source).end() :]
        if TEXT_ENCODER_KEY.match(key):
            raise UserError(
                f"{file} adapts the text encoder, too ({source}), which is not supported here, and without that part "
                "the rest draws something else; give an adapter trained without --train_text_encoder"
            )
        if (match := ALPHA_KEY.fullmatch(key)) and tensor.numel() == 1:
            alphas[modules.get(match["module"], match["module"])] = float(tensor)
            continue
        if match := LEGACY_KEY.fullmatch(key):
            layer = "to_out.0" if match["projection"] == "to_out" else match["projection"]
            module, half = f"{match['attention']}.{layer}", match["half"]
        elif match := KOHYA_KEY.fullmatch(key):
            module, half = modules.get(match["module"], match["module"]), match["half"]
        elif match := DIFFUSERS_KEY.fullmatch(key) or PEFT_KEY.fullmatch(key):
            module, half = match["module"], match["half"]
        else:
            raise UserError(
                f"{file}: the key {source} is no LoRA weight of a UNet; known are <module>.lora_A.weight (peft), "
                "<module>.lora.down.weight (diffusers), <attention>.processor.to_q_lora.down.weight (legacy) and "
                "lora_unet_<module>.lora_down.weight (kohya)"
            )
        name = f"{module}.lora_{HALVES.get(half, half)}.weight"
        if name in weights:
            raise UserError(f"{file}: {sources[name]} and {source} are the same weight; give a file with one adapter")
        weights[name], sources[name] = tensor, source
    if not weights:
        raise UserError(f"{file} is empty; give a file with LoRA weights")
    if strange := [module for module in alphas if f"{module}.lora_A.weight" not in weights]:
        raise UserError(f"{file} states alpha for {strange[0]} but holds no adapter of it; fetch the whole file again")
    return weights, sources, alphas


def _scale(file: Path, metadata: dict[str, str]) -> float:
    """alpha / rank as stated by peft's adapter_config.json beside the file, or by diffusers in its metadata; else 1."""
    config_file = file.with_name("adapter_config.json")
    if file.name.startswith("adapter_model") and config_file.is_file():
        config = _parsed(config_file.read_text(), config_file)
    else:
        # a pipeline writes unet.r, a UNet on its own writes r
        stated = _parsed(metadata.get("lora_adapter_metadata", "{}"), file)
        config = {key.removeprefix("unet."): value for key, value in stated.items()}
    for option in ("alpha_pattern", "use_dora"):
        if config.get(option):
            raise UserError(f"{file} was trained with {option}, which is not supported; use plain LoRA weights")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not rank or alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _parsed(text: str, file: Path) -> dict:
    advice = "it states no readable adapter configuration: fetch it again"
    stated = {"r": OneOf((range(1, 2**20), None)), "lora_alpha": OneOf((float, None))}
    shape = {f"{prefix}{name}?": one for name, one in stated.items() for prefix in ("", "unet.")}
    return parse_json(text, shape, repr(str(file)), advice)


def _check_every_attention(unet: nn.Module, expected: dict[str, tuple[int, ...]], file: Path) -> None:
    """An attention-processor file adapts all projections of every attention; one that lacks some was cut."""
    for name, module in unet.named_modules():
        for projection in ATTENTION if isinstance(module, Attention) else ():
            if f"{name}.{projection}.lora_A.weight" not in expected:
                raise UserError(f"{file} lacks the adapter of {name}.{projection}; fetch the whole file again")


def _expected_shapes(
    unet: nn.Module, weights: dict[str, torch.Tensor], sources: dict[str, str], file: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of both halves for every module that the file names, at the rank of the file's first weight."""
    modules = dict(unet.named_modules())
    first = next(iter(weights))
    rank = weights[first].shape[0 if ".lora_A." in first else 1] if weights[first].ndim > 1 else 0
    expected = {}
    for key in weights:
        name = key.rpartition(".lora_")[0]
        layer = modules.get(name)
        if isinstance(layer, nn.Linear):
            down, up = (rank, layer.in_features), (layer.out_features, rank)
        elif isinstance(layer, nn.Conv2d):
            down, up = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
        else:
            raise UserError(
                f"{file}: {sources[key]} names no linear or convolutional layer of the UNet; use the base model that "
                "the weights were trained on"
            )
        expected[f"{name}.lora_A.weight"], expected[f"{name}.lora_B.weight"] = down, up
    return expected
