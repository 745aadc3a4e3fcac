"""Add, train, save and load LoRA adapters of the UNet (Hu et al. 2021), W x + up(down x).

`down` (lora_A) has shape (rank, in), `up` (lora_B) shape (out, rank). The scale alpha / rank is 1, as in the published
checkpoint, and adapters are float32 whatever the UNet's dtype. All functions take the bare UNet, without DDP.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from ddpo_pytorch.generator.parts import check_fit
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import OneOf, parse_json
from ddpo_pytorch.utils.weights import check_finite, read_tensors

ADAPTER = "default"  # the name under which peft keeps the adapter
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of every attention layer
FILE_NAME = "pytorch_lora_weights.safetensors"
# file names in a folder, newest format first
FILE_NAMES = (FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
PEFT_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B)(\.[^.]+)?\.weight")  # with or without the adapter's name
KOHYA_KEY = re.compile(r"lora_unet_(?P<module>[^.]+)\.lora_(?P<half>down|up)\.weight")
ALPHA_KEY = re.compile(r"(lora_unet_)?(?P<module>.+?)(\.lora)?\.alpha")
TEXT_ENCODER_KEY = re.compile(r"text_encoder(_2)?\.|lora_te\d?_")


def add_lora(unet: UNet2DConditionModel, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add trainable adapters to every UNet layer whose name ends in one of `targets`; freeze everything else.

    `down` is drawn from N(0, 1 / rank^2), identically on every device; `up` is zero, so the UNet's output does not yet
    change. Raises UserError for rank below 1, a target that names no layer, or a UNet with adapters.
    """
    if rank < 1:
        raise UserError(f"LoRA rank is {rank}; allowed is 1 or more (the published checkpoint has 4)")
    if has_lora(unet):
        raise UserError("the UNet has LoRA adapters already")
    names = [f".{name}" for name in _layers(unet)]
    for target in targets or [""]:
        if not target or not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"LoRA target {target!r} names no linear layer or convolution; use {', '.join(ATTENTION)}")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    unet.add_adapter(config, adapter_name=ADAPTER)

    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(_adapter_weights(unet).items()):
        # peft follows the dtype of the frozen layer; half precision would round small updates away
        parameter.data = parameter.data.float()
        if ".lora_A." in key:  # lora_B is zero
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)


def cast_adapters(unet: nn.Module) -> None:
    """Let adapters, stored in float32, compute in the dtype of their input, as they do under autocast.

    A frozen UNet in half precision then needs no autocast, which keeps norms in float32 for the backward pass: 6.2
    instead of 8.7 GiB for 8 UNet inputs of SD 1.5 at 512 px.
    """
    for layer in unet.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.forward = partial(_forward_in_type_of_input, part)


def _forward_in_type_of_input(part: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    weight = part.weight.to(x.dtype)
    return nn.functional.linear(x, weight) if isinstance(part, nn.Linear) else part._conv_forward(x, weight, None)


def has_lora(unet: nn.Module) -> bool:
    """Return whether the UNet has adapters."""
    return any(isinstance(module, LoraLayer) for module in unet.modules())


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """Return the adapters' weights, float32, in the order of the UNet's modules."""
    return list(_adapter_weights(unet).values())


def lora_state_dict(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the adapters' weights on the CPU, by unet.<module>.lora_{A,B}.weight as in `save_lora`."""
    return {f"unet.{key}": value.detach().cpu().clone().contiguous() for key, value in _adapter_weights(unet).items()}


def adapter_fingerprint(unet: nn.Module) -> str:
    """Return the fingerprint of the adapters' weights, or "" without adapters."""
    return fingerprint(lora_state_dict(unet)) if has_lora(unet) else ""


def save_lora(unet: nn.Module, folder: str | Path) -> Path:
    """Write the adapters in the format of diffusers' `load_lora_weights`; return the file."""
    file = Path(folder) / FILE_NAME
    with atomic_write(file) as temporary:
        save_file(lora_state_dict(unet), temporary, metadata={"format": "pt"})
    return file


def load_lora(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Load adapters from a file or folder, adding them first when the UNet has none.

    Reads the formats of diffusers < 0.22 (attention processors, as in the published checkpoint), peft, diffusers'
    training scripts and kohya, as .safetensors or .bin, with or without the prefixes "unet." and "base_model.model.".
    If the file states a scale alpha / rank other than 1, it is multiplied into `up`. A file that does not match the
    UNet raises UserError and changes nothing.
    """
    path = Path(path).expanduser()
    candidates = [path / name for name in FILE_NAMES] if path.is_dir() else [path]
    if (file := next(filter(Path.is_file, candidates), None)) is None:
        raise UserError(f"no LoRA weights at {str(path)!r}; give a file, or a folder with {' or '.join(FILE_NAMES)}")
    tensors, metadata = read_tensors(file)
    weights, sources, alphas = _in_peft_names(tensors, unet, file)
    scale = _scale(file, metadata)
    if added := not has_lora(unet):
        # attention-processor files adapt every attention layer: one that lacks some is truncated
        legacy = any(".processor." in source for source in sources.values())
        modules = set() if legacy else {key.rpartition(".lora_")[0] for key in weights} & _layers(unet)
        rank = next((weight.shape[0] for key, weight in weights.items() if ".lora_A." in key and weight.ndim), 1)
        add_lora(unet, rank, sorted(modules) or ATTENTION, seed=0)
    adapters, advice = _adapter_weights(unet), "use the file's base model, train.lora_rank and train.lora_targets"
    scaled = {}
    try:
        check_fit(weights, adapters, file, f"{advice}, or fetch it again", sources)
        for key, weight in weights.items():
            module, half = key.rsplit(".lora_", 1)
            own_scale = alphas[module] / len(weights[f"{module}.lora_A.weight"]) if module in alphas else scale
            scaled[key] = weight.float() * (own_scale if half == "B.weight" else 1.0)
        check_finite(scaled, file)
    except UserError:
        if added:
            unet.unload_lora()
        raise
    with torch.no_grad():
        for key, parameter in adapters.items():
            parameter.copy_(scaled[key])


@torch.no_grad()
def scale_lora(unet: nn.Module, scale: float) -> None:
    """Scale the adapters' contribution: 0 gives the base model. Raises UserError for a UNet without adapters."""
    if scale != 1 and not has_lora(unet):
        raise UserError(f"eval.lora_scale is {scale}, but load_from gives no LoRA adapters; set it to 1")
    for key, weight in _adapter_weights(unet).items():
        if ".lora_B." in key:
            weight.mul_(scale)


@torch.no_grad()
def merged_state_dict(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies on the CPU of the UNet's weights, in diffusers' names, with adapters merged: W + up down."""
    # float32, since half precision would round most of a small correction away
    weights = {name.replace(".base_layer.", "."): w for name, w in unet.state_dict().items() if ".lora_" not in name}
    state = {name: weight.to("cpu", torch.float32, copy=True).contiguous() for name, weight in weights.items()}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            state[f"{name}.weight"] += layer.get_delta_weight(ADAPTER).float().cpu()
    return state


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Replace adapters, if there are any, by their sum with the weights, in float32."""
    if has_lora(unet):
        weights = merged_state_dict(unet)
        unet.unload_lora()
        unet.float().load_state_dict(weights)


@contextmanager
def disabled_lora(unet: UNet2DConditionModel) -> Iterator[None]:
    """Turn the UNet into the base model within this context: a free reference for the KL divergence."""
    # peft freezes the adapters that it disables and unfreezes all that it enables
    frozen = [parameter for parameter in lora_parameters(unet) if not parameter.requires_grad]
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
        for parameter in frozen:
            parameter.requires_grad_(False)


def _layers(unet: nn.Module) -> set[str]:
    """Return the names of the layers that can have an adapter."""
    return {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def _adapter_weights(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' weights by <module>.lora_{A,B}.weight."""
    marker, named = f".{ADAPTER}.weight", unet.named_parameters()
    return {name.replace(marker, ".weight"): weight for name, weight in named if ".lora_" in name and marker in name}


def _in_peft_names(tensors: dict[str, torch.Tensor], unet: nn.Module, file: Path) -> tuple[dict, dict, dict]:
    """Return tensors by <module>.lora_{A,B}.weight, their names in the file, and alpha by module."""
    weights, sources, alphas = {}, {}, {}
    modules = {name.replace(".", "_"): name for name, _ in unet.named_modules()}  # by kohya's names
    for source, tensor in tensors.items():
        key = source.removeprefix("base_model.model.").removeprefix("unet.")
        if TEXT_ENCODER_KEY.match(key):
            raise UserError(f"{file}: {source} adapts the text encoder; give an adapter of the UNet alone")
        if (match := ALPHA_KEY.fullmatch(key)) and tensor.numel() == 1:
            alphas[modules.get(match["module"], match["module"])] = float(tensor)
            continue
        if match := KOHYA_KEY.fullmatch(key):
            key = f"{modules.get(match['module'], match['module'])}.lora.{match['half']}.weight"
        (key,) = convert_unet_state_dict_to_peft({key: tensor})
        match = PEFT_KEY.fullmatch(key)
        name = f"{match['module']}.lora_{match['half']}.weight" if match else ""
        if not match or name in weights:
            problem = f"is the same weight as {sources[name]}" if match else "is not a weight that peft or kohya writes"
            raise UserError(f"{file}: {source} {problem}; give a file with one LoRA adapter of a UNet")
        weights[name], sources[name] = tensor, source
    lacking = [module for module in alphas if f"{module}.lora_A.weight" not in weights]
    if lacking := lacking or ["the UNet"] * (not weights):
        raise UserError(f"{file} holds no adapter of {lacking[0]}; fetch the whole file again")
    return weights, sources, alphas


def _scale(file: Path, metadata: dict[str, str]) -> float:
    """Return alpha / rank from peft's adapter_config.json next to the file, or from diffusers' metadata; else 1."""
    text, place = metadata.get("lora_adapter_metadata", "{}"), file
    if file.name.startswith("adapter_model") and (config_file := file.with_name("adapter_config.json")).is_file():
        text, place = config_file.read_bytes(), config_file
    fields = {"r": OneOf((range(1, 2**20), None)), "lora_alpha": OneOf((float, None))}
    shape = {f"{prefix}{name}?": kind for name, kind in fields.items() for prefix in ("", "unet.")}
    stated = parse_json(text, shape, repr(str(place)), "it states no readable adapter configuration: fetch it again")
    config = {key.removeprefix("unet."): value for key, value in stated.items()}  # pipelines write unet.r, UNets r
    if unsupported := next(filter(config.get, ("alpha_pattern", "use_dora")), None):
        raise UserError(f"{place} was trained with {unsupported}, which is not supported; use plain LoRA weights")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not rank or alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
