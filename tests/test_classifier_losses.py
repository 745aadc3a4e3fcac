"""The classifier's loss against its definition, and which images an epoch shows to which process."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torchvision.ops import sigmoid_focal_loss

from ddpo_pytorch.data.images import ImageFiles
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges import classifier_training as training
from ddpo_pytorch.judges.classifier import ArtifactClassifier
from ddpo_pytorch.judges.classifier_training import attribute_loss, deal, epoch_order, positive_weights, random_flips
from ddpo_pytorch.utils.errors import UserError


def by_definition(logits, labels, pos_weight, gamma):
    """The loss term by term, in double precision."""
    p = torch.sigmoid(logits.double())
    positive = labels * pos_weight * (1 - p) ** gamma * -p.log()
    return (positive + (1 - labels) * p**gamma * -(1 - p).log()).mean()


def test_loss_equals_independent_formulas():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(50, 4), (torch.rand(50, 4) < 0.2).float()
    weight = torch.tensor([1.0, 3.0, 0.5, 8.0])
    assert torch.allclose(attribute_loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels))
    for gamma in (0.5, 2.0):
        reference = sigmoid_focal_loss(logits, labels, alpha=-1, gamma=gamma, reduction="mean")
        assert torch.allclose(attribute_loss(logits, labels, focal_gamma=gamma), reference)
        both = attribute_loss(logits, labels, weight, gamma)
        assert both.item() == pytest.approx(by_definition(logits, labels, weight, gamma).item(), rel=1e-6)
    weighted = attribute_loss(logits, labels, weight)
    assert weighted.item() == pytest.approx(by_definition(logits, labels, weight, 0).item(), rel=1e-6)

    sure = torch.tensor([[100.0, -100.0]], requires_grad=True)
    attribute_loss(sure, torch.tensor([[1.0, 0.0]]), focal_gamma=0.5).backward()
    assert sure.grad.isfinite().all()
    assert positive_weights(torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]]), ("a", "b")).tolist() == pytest.approx(
        [3, 1 / 3]
    )
    with pytest.raises(UserError, match="no negative of 'b'"):
        positive_weights(torch.tensor([[1.0, 1], [0, 1]]), ("a", "b"))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch_size"), [(13, 4), (33, 16), (48, 16), (5, 1), (3, 32)])
def test_an_epoch_shows_every_image_once(images, batch_size, processes):
    orders = []
    for epoch in range(2):
        order = epoch_order(images, images, 42, epoch)
        shares = [deal(order, batch_size, rank, processes) for rank in range(processes)]
        dealt = [batch for step in zip(*shares, strict=True) for batch in step]
        assert sorted(index for batch in dealt for index in batch) == list(range(images))
        sizes = {len(batch) for batch in dealt}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
        steps = math.ceil(images / (batch_size * processes))
        if images >= steps * processes:
            assert max(sizes) <= batch_size and len(shares[0]) == steps
        orders.append(order.tolist())
    if images > 5:
        orders += [epoch_order(images, images, 43, 0).tolist(), list(range(images))]
        assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("drawn", [5, 13, 20, 40])
def test_epochs_of_another_length_walk_through_permutations(drawn):
    walk = torch.cat([epoch_order(13, drawn, 1, epoch) for epoch in range(13)])
    assert len(walk) == 13 * drawn
    rounds = walk.view(drawn, 13)
    assert (rounds.sort(1).values == torch.arange(13)).all()
    assert torch.equal(rounds[1], epoch_order(13, 13, 1, 1))


def test_flips_mirror_each_image_on_its_own():
    torch.manual_seed(0)
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    flipped = random_flips(image.repeat(400, 1, 1, 1))
    variants = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    counts = [sum(torch.equal(one, variant) for one in flipped) for variant in variants]
    assert sum(counts) == 400 and all(abs(count - 100) < 40 for count in counts)  # 4.6 standard deviations
    turned = random_flips(image.repeat(800, 1, 1, 1), quarter_turns=True)
    variants += [variant.transpose(-1, -2) for variant in variants]
    counts = [sum(torch.equal(one, variant) for one in turned) for variant in variants]
    assert sum(counts) == 800 and all(abs(count - 100) < 43 for count in counts)


def test_the_running_average_is_what_is_kept(tmp_path, monkeypatch):
    rng, paths = np.random.default_rng(0), [tmp_path / f"{number}.png" for number in range(24)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    files = ImageFiles(paths, torch.from_numpy(rng.integers(0, 2, (24, 4))).float(), 32)
    torch.manual_seed(0)
    model, after = ArtifactClassifier(LABELS[:4], 32, "tinynet_e"), []
    update = training.ModelEmaV3.update

    def record(self, network, step):
        after.append({name: value.clone() for name, value in network.state_dict().items()})
        update(self, network, step)

    monkeypatch.setattr(training.ModelEmaV3, "update", record)
    recipe = training.Recipe(num_epochs=2, batch_size=4, learning_rate=1e-3, ema_decay=0.6)
    kept = []
    result = training.fit(Accelerator(cpu=True), model, files, files, recipe, on_best=lambda best: kept.append(
        {name: value.clone() for name, value in model.state_dict().items()}))  # fmt: skip
    assert len(after) == 12 and len(kept) >= 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[-1][name])
        if value.is_floating_point():
            average = after[0][name].double()
            for number, state in enumerate(after[1 : 6 * (result.best_epoch + 1)], start=1):
                decay = min(0.6, 1 - (1 + number) ** -0.75)
                average = decay * average + (1 - decay) * state[name].double()
            torch.testing.assert_close(value.double(), average, rtol=1e-4, atol=1e-6)
