"""The cache of networks' results: devices and precisions, whose last digits differ, share nothing."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ddpo_pytorch.metrics.feature_store import FeatureStore, Network
from ddpo_pytorch.metrics.image_sets import ImageSet


def test_each_device_and_precision_has_results_of_its_own(tmp_path, monkeypatch):
    """The meta device stands in for a GPU: any device but the CPU is told apart in the same way."""
    paths = tuple(tmp_path / f"{number}.png" for number in range(3))
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    images, computed = ImageSet(tmp_path, paths, ("",) * 3, ("a", "b", "c")), []
    accelerator = Accelerator(cpu=True)
    names = ("is_main_process", "process_index", "num_processes", "wait_for_everyone")

    def run(batch):
        computed.append(batch.device.type)
        return torch.full((len(batch), 1), float(len(computed)))

    def first_row(device, tf32):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        place = SimpleNamespace(device=torch.device(device), **{name: getattr(accelerator, name) for name in names})
        store = FeatureStore(tmp_path / "cache", place, 4, progress=False)
        return store.features("images", images, [Network("n", "n", "", "key", run)])["n"][:1].item()

    settings = [("cpu", False), ("meta", False), ("meta", True)]
    assert [first_row(*one) for one in settings] == [1, 2, 3] == [first_row(*one) for one in settings]
    assert computed == ["cpu", "meta", "meta"] and first_row("cpu", True) == pytest.approx(1)  # TF32 is a GPU's
