"""Run scripts on a simulated GPU and print their peak memory, host syncs and types: no GPU is needed.

    python benchmarks/simulated_gpu.py scripts/train.py --config config/mini.py:prompt_image_alignment_classifier_isic

Several scripts, each with its options, are separated by "--" and share the start; each prints a line of JSON.

A small library answers PyTorch's questions for devices (one GPU of capability 8.0 and 80 GiB), and every CUDA tensor is
a FakeTensor: shape, type, strides and device without contents. Tensors on the CPU stay real. A mix of devices, a type
that an operation does not take, or a tensor left on the CPU raises as on a real GPU.

Whatever the host reads from the device, or copies to it without pinned memory, counts as a sync of the line that asked.
What it reads is a constant: 0.5, 0 for integers, True for truths (False after `any`). Results are therefore
meaningless, and nothing is learned. It cannot show races between streams, results of kernels, time, allocator
fragmentation, NCCL, or several GPUs. Needs Linux, a C compiler and PyTorch's CUDA build.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

LIBRARY = "libcuda.so.1"  # the name under which PyTorch looks for the driver
SHIM = r"""
#include <string.h>
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cudaGetDeviceProperties(char *properties, int device) {
    memset(properties, 0, 512);
    *(unsigned long *)(properties + 288) = 80UL << 30; /* totalGlobalMem */
    *(int *)(properties + 360) = 8;                    /* major; minor is 0 */
    return 0;
}
"""


def start_again() -> int:
    """Run this command once more, with the library in place of the driver; return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder, LIBRARY), Path(folder, "shim.c")
        source.write_text(SHIM)
        subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", library, source], check=True)
        preloaded = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "CUDA_VISIBLE_DEVICES": "0"}
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | preloaded).returncode


if __name__ == "__main__" and LIBRARY not in os.environ.get("LD_PRELOAD", ""):
    sys.exit(start_again())  # before PyTorch is imported, which takes seconds

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tuple(str(ROOT / name) for name in ("ddpo_pytorch", "scripts"))
PROPERTIES = SimpleNamespace(name="simulated", major=8, minor=0, total_memory=80 << 30, multi_processor_count=108)
LIBRARIES = ("diffusers.loaders", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "timm")
LIBRARIES += ("accelerate", "ml_collections.config_flags", "torchvision", "scipy.stats", "transformers.pipelines")
LIBRARIES += ("transformers.models.clip.modeling_clip", "pandas", "torchmetrics", "matplotlib.figure")
MOVED: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # from the CPU
PREPARE, SAVE = Accelerator.prepare, torch.save
aten = torch.ops.aten


def constant(tensor: FakeTensor) -> torch.Tensor:
    """Return what the host reads from a tensor without contents."""
    value = getattr(tensor, "answer", True) if tensor.dtype == torch.bool else 0.5 if tensor.is_floating_point() else 0
    return torch.full(tensor.shape, value, dtype=tensor.dtype)


def target_of_copy(args: tuple, kwargs: dict) -> str:
    """Return the type of the device that `_to_copy` or `copy_` writes to."""
    return torch.device(kwargs.get("device") or args[0].device).type


def tensors_of(arguments: Iterable) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments, and in lists of them."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_of(argument)


class SimulatedGPU(TorchDispatchMode):
    """Run CUDA operations on tensors without contents.

    Attributes:
        syncs: number of times the host waited for the device, by (kind, "file:line function").
        types: number of matrix products and convolutions by type of their result.
        live, peak: bytes of CUDA storages, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.syncs, self.types, self.live, self.peak = Counter(), Counter(), 0, 0
        self._sizes: dict[int, int] = {}

    def sync(self, kind: str) -> None:
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(PROJECT):
            frame = frame.f_back
        place = "?"
        if frame:
            code = frame.f_code
            place = f"{os.path.relpath(code.co_filename, ROOT)}:{frame.f_lineno} {code.co_name}"
        self.syncs[kind, place] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
        target = torch.device(kwargs.get("device") or "cpu").type
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if target != "cuda" and not any(tensor.device.type == "cuda" for tensor in tensors):
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            self.sync("item")
            return constant(args[0]).item()
        if function is aten.equal.default:
            self.sync("equal")
            return True
        if function is aten._to_copy.default and "device" in kwargs and target == "cpu":
            self.sync("copy to host")  # even without blocking, what arrives must be waited for
            return constant(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        if function is aten.copy_.default and args[0].device.type == "cpu":
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.sync("copy to host")
            return args[0].copy_(constant(args[1]))
        if function in (aten._to_copy.default, aten.copy_.default) and target_of_copy(args, kwargs) == "cuda":
            if tensors[-1].device.type == "cpu" and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.sync("copy to device")
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            for index in args[1]:
                if index is not None and index.device.type == "cpu":
                    self.sync("copy of indices")
        if function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.sync("boolean mask")
            return args[0].flatten() if args[1][0].ndim == args[0].ndim else args[0]
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map(self._without_contents, (args, kwargs))
        result = self.fake.__torch_dispatch__(function, types, args, kwargs)  # as if entered, in less time
        if function.overloadpacket is aten.any:
            result.answer = False
        if function.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.convolution):
            self.types[str(result.dtype)] += 1
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            self._track(leaf)
        return result

    def _without_contents(self, leaf):
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        with self.fake:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)

    def _track(self, leaf) -> None:
        if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":
            storage = leaf.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class Stream:
    """Stand in for streams and events, which order nothing here."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *_: self


def move(module: torch.nn.Module, convert, recurse: bool = True) -> torch.nn.Module:
    """Stand in for Module._apply, which swaps the contents of a parameter and fails where anything refers to it."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                value = convert(parameter)
            if value is not parameter:
                module._parameters[name] = torch.nn.Parameter(value.detach(), parameter.requires_grad)
                if parameter.device.type == "cpu":
                    MOVED[parameter] = module._parameters[name]
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module


def prepare(accelerator: Accelerator, *parts: object, **options: object) -> object:
    """Stand in for Accelerator.prepare: an optimizer made before its model is moved keeps the moved parameters."""
    prepared = PREPARE(accelerator, *parts, **options)
    for part in prepared if isinstance(prepared, tuple) else (prepared,):
        if isinstance(part, AcceleratedOptimizer):
            for group in part.param_groups:
                group["params"] = [MOVED.get(parameter, parameter) for parameter in group["params"]]
    return prepared


def save(state: object, file: object, **options: object) -> None:
    """Stand in for torch.save, which cannot write tensors without contents."""
    SAVE(tree_map(lambda leaf: constant(leaf) if isinstance(leaf, FakeTensor) else leaf, state), file, **options)


def run_now(pool: ThreadPoolExecutor, function, *args, **kwargs) -> Future:
    """Stand in for ThreadPoolExecutor.submit: threads would leave the mode."""
    future = Future()
    initializer, pool._initializer = pool._initializer, None
    try:
        if initializer:
            initializer(*pool._initargs)
        future.set_result(function(*args, **kwargs))
    except BaseException as error:
        future.set_exception(error)
    return future


def install(gpu: SimulatedGPU) -> None:
    """Replace what would call CUDA itself, for the rest of this process."""

    def nothing(*_, **__) -> None:
        pass

    stand_ins = {
        **dict.fromkeys(("_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "set_device"), nothing),
        **dict.fromkeys(("set_rng_state", "set_rng_state_all"), nothing),
        **dict.fromkeys(("Stream", "Event", "current_stream", "stream"), Stream),
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda *_: PROPERTIES,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": list,
        "reset_peak_memory_stats": lambda *_: setattr(gpu, "peak", gpu.live),
        "synchronize": lambda *_: gpu.sync("synchronize"),
        "memory_allocated": lambda *_: gpu.live,
        "max_memory_allocated": lambda *_: gpu.peak,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.save = save
    torch.Tensor.record_stream = nothing
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    FakeTensor.tolist = lambda tensor: tensor.detach().cpu().tolist()  # not number by number
    torch.nn.Module._apply, Accelerator.prepare = move, prepare
    ThreadPoolExecutor.submit = run_now
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") passes through the mode as well


def main() -> int:
    sys.path[:1] = [str(ROOT)]
    commands = [[]]
    for word in sys.argv[1:]:
        commands[-1:] = [commands[-1], []] if word == "--" else [[*commands[-1], word]]
    for name in LIBRARIES if len(commands) > 1 else ():
        importlib.import_module(name)
    gc.freeze()  # nothing of the libraries is garbage: no collection need look at them
    for command in commands:
        if not (child := os.fork()):
            status = run(command)
            sys.stdout.flush()
            os._exit(status)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return status
    return 0


def run(command: list[str]) -> int:
    """Run a script and print what was counted; return its exit status."""
    gpu, status, sys.argv[:] = SimulatedGPU(), 0, command
    install(gpu)
    try:
        with gpu:
            runpy.run_path(os.path.abspath(sys.argv[0]), run_name="__main__")
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except Exception:
        traceback.print_exc()
        status = 1
    counted = {"script": Path(command[0]).name, "peak_gib": round(gpu.peak / 2**30, 3), "products": gpu.types}
    print(json.dumps(counted | {"host_syncs": [[count, *key] for key, count in gpu.syncs.most_common()]}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
