"""Rated images in memory, measures against scipy and by definition, the calibrated threshold."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rated_world import SIZE, stripes
from refusals import refused
from scipy import stats

from ddpo_pytorch.data.images import load_image, to_uint8
from ddpo_pytorch.data.ratings import RatedImage
from ddpo_pytorch.generator.from_scratch import build_vae
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.judges.vit import VisionSizes, resized
from ddpo_pytorch.phantoms import fundus
from ddpo_pytorch.phantoms.damage import KINDS, STRUCTURAL
from ddpo_pytorch.rlhf.rated_images import best_threshold, by_finding, measures, probe, read_rated, through_autoencoder


def rated(path: Path, prompt="Fundus: drusen", quality=2.0, alignment=2.0, weight=1.0, picture=None) -> RatedImage:
    """An image with these ratings; `picture` (H, W, 3) uint8 is saved as that image."""
    if picture is not None:
        Image.fromarray(picture).save(path)
    return RatedImage(path.name, path, prompt, quality, alignment, weight, path.stem)


@pytest.fixture(params=range(3))
def table(request):
    """Scores and rewards with ties in both, of 7 to 60 images."""
    rng, count = np.random.default_rng(request.param), (7, 20, 60)[request.param]
    scores = rng.integers(0, 12, count) / 11
    rewards = (rng.integers(0, 5, count) / 4 + (rng.random(count) < 0.5) * scores).clip(0, 1)
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(rewards, dtype=torch.float32)


def test_measures_agree_with_scipy_and_definitions(table):
    scores, rewards = (values.double().numpy() for values in table)
    found = measures(*table, threshold=0.5)
    good, bad = scores[rewards >= 0.5], scores[rewards < 0.5]
    gaps = 0.0
    for low in np.arange(10) / 10:
        inside = (scores >= low) & ((scores < low + 0.1) | ((low == 0.9) & (scores == 1)))
        if inside.any():
            gaps += inside.sum() * abs(scores[inside].mean() - rewards[inside].mean())
    expected = {
        "mae": np.mean([abs(s - r) for s, r in zip(scores, rewards, strict=True)]),
        "spearman": stats.spearmanr(scores, rewards).statistic,
        "auc": stats.mannwhitneyu(good, bad).statistic / (len(good) * len(bad)),
        "calibration_error": gaps / len(scores),
        "pass_rate": np.mean(scores >= 0.5),
    }
    assert found == pytest.approx(expected, abs=1e-6) and found["auc"] == pytest.approx(expected["auc"], abs=1e-12)

    constant, rewards = torch.full((4,), 0.5), torch.tensor([0.0, 0.5, 1.0, 1.0])
    equal, reverse = measures(constant, rewards), measures(1 - rewards, rewards)
    assert (equal["spearman"], equal["auc"]) == (None, 0.5) and reverse["spearman"] == pytest.approx(-1)
    assert measures(rewards, constant)["auc"] is None and measures(rewards, rewards)["calibration_error"] == 0


def test_probes_show_what_a_selector_passes_that_is_no_retina(tmp_path):
    """A Selector that sees red alone passes mirrored halves as the retinas themselves, and flat fields nearly so."""
    rng, images = np.random.default_rng(0), []
    for number in range(6):
        picture = fundus.draw("normal fundus", "left", fundus.draw_look(rng), rng, SIZE)
        picture = picture if number else np.where(picture > 15, 90, picture)
        images.append(rated(tmp_path / f"{number}.png", quality=3.0 if number else 1.0, picture=picture))
    selector = Selector(VisionSizes(SIZE, 8, 32, 1, 2))
    selector.score, selector.threshold = lambda pixels: pixels[:, 0].mean((1, 2)), 0.1
    table = probe(selector, read_rated(images, SIZE, "stretch"), 4).set_index("kind")
    assert list(table.index) == ["rated 3", *KINDS, *STRUCTURAL, "no visible vessels"]
    assert table.loc["rated 3", ["images", "passed", "AUC"]].tolist() == ["5", "1.000", "0.500"]
    assert table.loc["flat", "passed"] == table.loc["mirrored", "passed"] == "1.000" and table.images.iloc[-1] == "1"
    assert float(table.loc["swapped", "AUC"]) > 0.9


def test_policy_is_reported_by_finding(tmp_path):
    """Scores that are right for drusen, chance for cataract; lens dust is too rare."""
    Image.new("RGB", (SIZE, SIZE)).save(path := tmp_path / "x.png")
    says = ["drusen", "cataract", "drusen, cataract"] * 20 + ["lens dust"] * 12
    prompts = [f"Fundus: The left eye fundus image shows {text}." for text in says]
    aligned = [3.0 if number % 2 else 1.0 for number in range(60)] + [3.0] * 12
    images = [rated(path, *one) for one in zip(prompts, [3.0] * 72, aligned, strict=True)]
    learned = read_rated(images, SIZE, "stretch")
    only_drusen = torch.tensor([text == "drusen" for text in says])
    scores = torch.where(only_drusen, learned.rewards["alignment"], 0.5)
    table = by_finding(scores, learned).set_index("finding")
    assert list(table.index) == ["all", "drusen", "cataract"] and table.images.tolist() == ["72", "40", "40"]
    assert table.loc["drusen", "AUC"] == "0.875" and table.loc["cataract", "AUC"] == "0.500"


def test_the_threshold_has_the_best_j(table):
    threshold, youden = best_threshold(*table)
    scores, good = table[0].numpy(), table[1].numpy() >= 0.5

    def j(at):
        return (scores >= at)[good].mean() + (scores < at)[~good].mean() - 1

    middles = [(low + high) / 2 for low, high in itertools.pairwise(sorted(set(scores.tolist())))]
    assert j(threshold) == pytest.approx(youden, abs=1e-6) and youden == pytest.approx(max(map(j, middles)), abs=1e-6)
    assert threshold == pytest.approx(min(at for at in middles if j(at) > youden - 1e-6), abs=1e-6)

    # separable, neighbouring and equal scores
    rewards = torch.tensor([0.0, 0.0, 0.5, 1.0])
    assert best_threshold(torch.tensor([0.1, 0.2, 0.6, 0.9]), rewards) == (pytest.approx(0.4), 1.0)
    low = torch.tensor(0.7)
    high = torch.nextafter(low, torch.tensor(1.0))  # no float32 between them: the good ones still have to pass
    scores = torch.stack([low, low, high, high])
    threshold, youden = best_threshold(scores, rewards)
    assert youden == 1 and (scores >= threshold).tolist() == [False, False, True, True]
    threshold, youden = best_threshold(torch.full((4,), 0.3), rewards)
    assert youden == 0 and (torch.full((4,), 0.3) >= threshold).all()
    refused("needs ratings below 2 and of 2 or more", best_threshold, torch.rand(4), torch.ones(4))


def test_rated_set_with_and_without_autoencoder(tmp_path):
    rng, images = np.random.default_rng(0), []
    prompts = ["Fundus: drusen", "Fundus: the left eye", "Fundus: 3 o'clock", "Fundus: x"]
    for number, prompt in enumerate(prompts):
        grades = 1 + number / 2, 3 - number / 2, (number + 1) / 4
        images.append(rated(tmp_path / f"{number}.png", prompt, *grades, stripes(3, False, rng)))
    found = read_rated(images, SIZE, "stretch")
    assert found.images.dtype == torch.uint8 and found.images.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(found.images[2], torch.from_numpy(np.array(Image.open(tmp_path / "2.png"))).permute(2, 0, 1))
    rewards = {name: values.tolist() for name, values in found.rewards.items()}
    assert rewards == {"quality": [0, 0.25, 0.5, 0.75], "alignment": [1, 0.75, 0.5, 0.25]}
    assert found.weights.tolist() == [0.25, 0.5, 0.75, 1]
    assert found.mirrored == (prompts[0], "Fundus: the right eye", None, prompts[3])
    part = found.subset(torch.tensor([1, 3]))
    assert part.prompts == ("Fundus: the left eye", "Fundus: x") and torch.equal(part.images, found.images[[1, 3]])
    torch.manual_seed(0)
    vae = build_vae((8, 8), 32).eval().requires_grad_(False)
    passed = through_autoencoder(found, vae, 3)
    mean = vae.encode(found.images[3:4].float() / 127.5 - 1).latent_dist.mean.half().float()
    expected = to_uint8(vae.decode(mean).sample / 2 + 0.5)
    assert (passed.images[3:4].int() - expected.int()).abs().max() <= 1

    other = read_rated([rated(tmp_path / "0.png", quality=1.5)], SIZE), found.subset(torch.tensor([0, 3]))
    assert len({one.digest for one in (found, part, passed, *other)}) == 5
    many = read_rated([rated(tmp_path / "0.png")] * 200 + images[2:3] * 200, SIZE)
    flips = many.flips(5, 0)
    assert 70 < flips[:200].sum() < 130 and not flips[200:].any()
    assert torch.equal(many.flips(5, 0), flips) and not torch.equal(many.flips(5, 1), flips)

    # the same images have the same digest, a replaced one another
    assert found.digest == read_rated(images, SIZE, "stretch").digest
    Image.new("RGB", (SIZE, SIZE)).save(images[1].path)
    assert found.digest != read_rated(images, SIZE, "stretch").digest


def test_wrong_captions_share_no_finding_and_can_be_mirrored(tmp_path):
    Image.new("RGB", (SIZE, SIZE), "red").save(path := tmp_path / "0.png")
    captions = ("drusen, glaucoma", "drusen", "cataract", "myopia at 3 o'clock")
    images = [rated(path, f"Fundus: {caption}", alignment=grade) for caption in captions for grade in (3.0, 3.0, 2.0)]
    found = read_rated(images * 20, SIZE)
    sources = found.caption_sources(0.5, 7, 1)
    changed = (sources != torch.arange(240)).nonzero().flatten().tolist()
    assert 50 < len(changed) < 110 and {index % 3 for index in changed} == {0, 1}  # 80 of 160, and 4.7 deviations
    pairs = {(captions[index % 12 // 3], captions[int(sources[index]) % 12 // 3]) for index in changed}
    wrong = {captions[0]: {captions[2]}, captions[1]: {captions[2]}, captions[2]: {*captions[:2]}}
    wrong[captions[3]] = {*captions[:3]}
    assert pairs == {(own, other) for own, others in wrong.items() for other in others}
    assert torch.equal(sources, found.caption_sources(0.5, 7, 1))
    assert not torch.equal(sources, found.caption_sources(0.5, 7, 2))
    without = [(read_rated(part * 9, SIZE), 0.9) for part in (images[:3], images[9:])]
    for alone, share in [(found, 0.0), *without]:
        assert torch.equal(alone.caption_sources(share, 7, 1), torch.arange(len(alone)))


def test_any_kind_of_image_is_read_and_learned_as_it_is_scored(tmp_path):
    torch.manual_seed(0)
    selector = Selector(VisionSizes(SIZE, 8, 32, 2, 2))
    picture = Image.fromarray(stripes(3, True, np.random.default_rng(0), size=90))
    wide = Image.new("RGB", (150, 90))
    wide.paste(picture, (30, 0))
    kinds = {"large": picture, "grey": picture.convert("L"), "alpha": picture.convert("RGBA"), "wide": wide}
    for name, image in kinds.items():
        image.save(path := tmp_path / f"{name}.png")
        stored = read_rated([rated(path)], SIZE).images
        assert stored.shape == (1, 3, SIZE, SIZE)
        assert stored[..., 2].float().mean() > 50 and stored[..., -3].float().mean() > 50  # wide: cut to the lit part
        if name in ("large", "alpha"):
            stored, native = stored.float() / 255, load_image(path, resize="fov")[None]
            torch.testing.assert_close(stored * 2 - 1, selector.preprocess(native), rtol=0, atol=1.01 / 255)
            torch.testing.assert_close(selector.score(stored), selector.score(native), rtol=0, atol=1e-3)
    framed = Image.new("RGB", (150, 150))  # a square photograph with a black frame, as archives hold them
    framed.paste(picture, (30, 30))
    (path := tmp_path / "images" / "x" / "framed.png").parent.mkdir(parents=True)
    framed.save(path)
    in_use = resized(load_image(path, resize="fov")[None], SIZE)
    assert torch.equal(read_rated([rated(path)], SIZE).images, to_uint8(in_use))
    (tmp_path / "image_log.json").write_text("[]")  # a sample folder's images are as judges see them
    assert torch.equal(read_rated([rated(path)], SIZE).images, to_uint8(resized(load_image(path)[None], SIZE)))
    path.write_bytes(path.read_bytes()[:200])
    refused("framed.png", read_rated, [rated(path)], SIZE)
