"""scripts/train.py for the tests, which keeps the gradients of its first update and counts what a process has and does.

    RECORD=DIR python tests/update_recorder.py --config config/base.py ...

DIR/gradients.safetensors, by the main process: the gradient of every trained parameter right before the optimizer's
first step. DIR/counts_<rank>.json: bytes of the UNet's parameters and of the optimizer's state that a process keeps,
and the UNet inputs (rows of a batch) of its rollouts and updates. With CONTIGUOUS=1 weights lie in memory as FSDP has
them: convolutions in channels_last round differently.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from absl import flags
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ddpo_pytorch.utils.cli import cli
from ddpo_pytorch.utils.distributed import full_tensor

FOLDER = Path(os.environ["RECORD"])


def load_script():
    path = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
    spec = importlib.util.spec_from_file_location("train", path)
    sys.modules["train"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(run) -> None:
    """Let `run` write down its first gradients."""
    if os.environ.get("CONTIGUOUS"):
        run.pipe.unet.to(memory_format=torch.contiguous_format)
    trained = {name: value for name, value in run.pipe.unet.named_parameters() if value.requires_grad}
    with torch.no_grad():  # adapters begin at zero, where the gradient of their other half vanishes
        for number, (name, parameter) in enumerate(sorted(trained.items())):
            if ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.copy_(0.02 * noise)
    step, gradients = run.optimizer.step, {}

    def record_and_step(*arguments, **named):
        if run.accelerator.sync_gradients and not gradients:
            for name, parameter in trained.items():
                gradients[name] = full_tensor(parameter.grad).clone(memory_format=torch.contiguous_format)
            if run.accelerator.is_main_process:
                save_file(gradients, FOLDER / "gradients.safetensors")
        return step(*arguments, **named)

    run.optimizer.step = record_and_step


def counted(stage, inputs: dict[str, int]):
    """`stage` of an epoch, with the UNet's inputs during it added to `inputs` under its name."""

    def count(unet, arguments):
        inputs[stage.__name__] = inputs.get(stage.__name__, 0) + len(arguments[0])

    def run_stage(run, *arguments):
        hook = run.pipe.unet.register_forward_pre_hook(count)
        result = stage(run, *arguments)
        hook.remove()
        return result

    return run_stage


def own_bytes(tensors) -> int:
    """Bytes of tensors, or of the parts of them that this process holds."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def train(script) -> None:
    """Run `script` on the flags, with what it sets up put on record."""
    set_up, runs, inputs = script.set_up, [], {}

    def recording(config):
        run = set_up(config)
        runs.append(run)
        record(run)
        return run

    script.set_up = recording
    script.sample_and_score, script.update = counted(script.sample_and_score, inputs), counted(script.update, inputs)
    rank = os.environ.get("RANK", "0")
    script.train(flags.FLAGS.config)
    (run,) = runs
    state = [value for entry in run.optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    held = {
        "parameters": own_bytes(run.pipe.unet.state_dict().values()),
        "optimizer": own_bytes(state),
    }
    (FOLDER / f"counts_{rank}.json").write_text(json.dumps(held | inputs))


if __name__ == "__main__":
    train_script = load_script()  # it defines the flag "config"
    cli(lambda _: train(train_script))
