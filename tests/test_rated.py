"""Rated images in memory, measures against scipy and by definition, the calibrated threshold."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rated_world import SIZE, stripes
from scipy import stats

from ddpo_pytorch.data.ratings import RatedImage
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.judges.vit import VisionSizes
from ddpo_pytorch.rlhf.rated_images import auc, best_threshold, calibration_error, measures, read_rated
from ddpo_pytorch.utils.errors import UserError


def rated(path: Path, prompt="Fundus: drusen", quality=2.0, alignment=2.0, weight=1.0) -> RatedImage:
    return RatedImage(path.name, path, prompt, quality, alignment, weight, path.stem, 1)


@pytest.fixture(params=range(4))
def table(request):
    """Scores and rewards with ties in both, of 7 to 60 images."""
    rng = np.random.default_rng(request.param)
    count = (7, 20, 40, 60)[request.param]
    scores = rng.integers(0, 12, count) / 11
    rewards = (rng.integers(0, 5, count) / 4 + (rng.random(count) < 0.5) * scores).clip(0, 1)
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(rewards, dtype=torch.float32)


def test_measures_agree_with_scipy_and_definitions(table):
    scores, rewards = (values.double().numpy() for values in table)
    found = measures(*table, threshold=0.5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, rewards).statistic, abs=1e-12)
    good, bad = scores[rewards >= 0.5], scores[rewards < 0.5]
    pairs = [float(one > other) + 0.5 * (one == other) for one in good for other in bad]
    assert found["auc"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found["auc"] == pytest.approx(stats.mannwhitneyu(good, bad).statistic / (len(good) * len(bad)), abs=1e-12)
    assert found["mae"] == pytest.approx(np.mean([abs(s - r) for s, r in zip(scores, rewards, strict=True)]), abs=1e-12)
    gaps = 0.0
    for low in np.arange(10) / 10:
        inside = (scores >= low) & ((scores < low + 0.1) | ((low == 0.9) & (scores == 1)))
        if inside.any():
            gaps += inside.sum() * abs(scores[inside].mean() - rewards[inside].mean())
    assert found["calibration_error"] == pytest.approx(gaps / len(scores), abs=1e-6)
    assert found["pass_rate"] == pytest.approx(np.mean(scores >= 0.5))
    assert "pass_rate" not in measures(*table)


def test_measures_of_degenerate_sets():
    equal, mixed = np.full(4, 0.5), np.array([0.0, 0.5, 1.0, 1.0])
    constant, rewards = torch.full((4,), 0.5), torch.tensor(mixed)
    assert measures(constant, rewards)["spearman"] is None and measures(rewards, constant)["spearman"] is None
    assert measures(rewards, rewards)["spearman"] == pytest.approx(1)
    assert measures(1 - rewards, rewards)["spearman"] == pytest.approx(-1)
    assert auc(mixed, np.ones(4, bool)) is None and auc(equal, mixed > 0.5) == 0.5
    assert calibration_error(mixed, mixed) == 0 and calibration_error(equal, np.array([0, 0, 1, 1])) == 0


def test_threshold_has_the_best_j(table):
    threshold, youden = best_threshold(*table)
    scores, good = table[0].numpy(), table[1].numpy() >= 0.5

    def j(at):
        return (scores >= at)[good].mean() + (scores < at)[~good].mean() - 1

    levels = sorted(set(scores.tolist()))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    assert j(threshold) == pytest.approx(youden, abs=1e-6) and youden == pytest.approx(max(map(j, middles)), abs=1e-6)
    assert threshold == pytest.approx(min(at for at in middles if j(at) > youden - 1e-6), abs=1e-6)


def test_threshold_of_separable_neighbouring_and_equal_scores():
    rewards = torch.tensor([0.0, 0.0, 0.5, 1.0])
    assert best_threshold(torch.tensor([0.1, 0.2, 0.6, 0.9]), rewards) == (pytest.approx(0.4), 1.0)
    low = torch.tensor(0.7)
    high = torch.nextafter(low, torch.tensor(1.0))  # no float32 between them: the good ones still have to pass
    scores = torch.stack([low, low, high, high])
    threshold, youden = best_threshold(scores, rewards)
    assert youden == 1 and (scores >= threshold).tolist() == [False, False, True, True]
    threshold, youden = best_threshold(torch.full((4,), 0.3), rewards)
    assert youden == 0 and (torch.full((4,), 0.3) >= threshold).all()
    with pytest.raises(UserError, match="needs ratings below 2 and of 2 or more"):
        best_threshold(torch.rand(4), torch.ones(4))


def test_rated_set(tmp_path):
    rng, images = np.random.default_rng(0), []
    for number, prompt in enumerate(
        ["Fundus: drusen", "Fundus: the left eye", "Fundus: nasal haemorrhage", "Fundus: x"]
    ):
        path = tmp_path / f"{number}.png"
        Image.fromarray(stripes(3, False, rng)).save(path)
        images.append(rated(path, prompt, 1 + number / 2, 3 - number / 2, (number + 1) / 4))
    found = read_rated(images, SIZE)
    assert found.images.dtype == torch.uint8 and found.images.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(found.images[2], torch.from_numpy(np.array(Image.open(tmp_path / "2.png"))).permute(2, 0, 1))
    assert found.rewards["quality"].tolist() == [0, 0.25, 0.5, 0.75]
    assert found.rewards["alignment"].tolist() == [1, 0.75, 0.5, 0.25]
    assert found.weights.tolist() == [0.25, 0.5, 0.75, 1] and found.mirrored.tolist() == [True, False, False, True]
    part = found.subset(torch.tensor([1, 3]))
    assert len(part) == 2 and part.prompts == ("Fundus: the left eye", "Fundus: x")
    assert torch.equal(part.images, found.images[[1, 3]]) and part.weights.tolist() == [0.5, 1]
    assert len({found.digest, part.digest, found.subset(torch.tensor([0, 3])).digest}) == 3
    images[0] = rated(tmp_path / "0.png", "Fundus: drusen", 1.5, 3.0, 0.25)
    assert read_rated(images, SIZE).digest != found.digest
    many = read_rated([rated(tmp_path / "0.png")] * 200 + images[1:2] * 200, SIZE)
    flips = many.flips(5, 0)
    assert 70 < flips[:200].sum() < 130 and not flips[200:].any()  # never where the prompt names an eye
    assert torch.equal(many.flips(5, 0), flips) and not torch.equal(many.flips(5, 1), flips)


def test_images_are_learned_as_they_are_scored(tmp_path):
    torch.manual_seed(0)
    selector = Selector(VisionSizes(SIZE, 8, 32, 2, 2))
    picture = stripes(3, True, np.random.default_rng(0), size=90)
    Image.fromarray(picture).save(tmp_path / "large.png")
    stored = read_rated([rated(tmp_path / "large.png")], SIZE).images.float() / 255
    native = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(stored * 2 - 1, selector.preprocess(native), rtol=0, atol=1.01 / 255)
    torch.testing.assert_close(selector.score(stored), selector.score(native), rtol=0, atol=1e-3)


def test_any_kind_of_image_is_read(tmp_path):
    picture = Image.fromarray(stripes(3, True, np.random.default_rng(0), size=60))
    wide = Image.new("RGB", (100, 60))
    wide.paste(picture, (20, 0))
    for name, image in {
        "grey.png": picture.convert("L"),
        "alpha.png": picture.convert("RGBA"),
        "wide.png": wide,
    }.items():
        image.save(tmp_path / name)
        assert read_rated([rated(tmp_path / name)], SIZE).images.shape == (1, 3, SIZE, SIZE)
    lit = read_rated([rated(tmp_path / "wide.png")], SIZE).images[0]
    assert (
        lit[:, :, 2].float().mean() > 50 and lit[:, :, -3].float().mean() > 50
    )  # cut to the lit part, nothing beside it
    (tmp_path / "torn.png").write_bytes((tmp_path / "grey.png").read_bytes()[:200])
    with pytest.raises(UserError, match="torn.png"):
        read_rated([rated(tmp_path / "torn.png")], SIZE)
