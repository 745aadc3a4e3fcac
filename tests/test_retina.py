"""Pictures of the fundus phantom: functions of finding, eye and generator, in which every finding is seen."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.utils.errors import UserError

NORMAL, DRUSEN, GLAUCOMA, RETINOPATHY, MYOPIA = retina.FINDINGS


def picture(finding, seed=0, size=64, eye="right", **look):
    """(size, size, 3) float; equal seeds are one eye of one patient."""
    rng = np.random.default_rng(seed)
    patient = dataclasses.replace(retina.draw_look(rng), **look)
    return retina.draw(finding, eye, patient, rng, size).astype(float)


def middle(where):
    """Mean (x, y) of the true pixels, in points of a picture 64 wide."""
    rows, columns = np.nonzero(where)
    return (np.array([columns.mean(), rows.mean()]) + 0.5) * 64 / where.shape[1]


def test_a_picture_is_a_function_of_its_finding_eye_and_generator():
    image = picture(DRUSEN)
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image, picture(DRUSEN))
    assert (image != picture(DRUSEN, seed=1)).any(axis=2).mean() > 0.6  # all of the field, not the surround


@pytest.mark.parametrize("size", [64, 100])
def test_the_field_is_a_centred_disc_in_a_black_surround(size):
    """Its area is that of a circle of radius 31 of 64; the rim, half lit, counts by the threshold of the mask."""
    for seed in range(5):
        image = picture(NORMAL, seed, size)
        mask = fov_mask(image.astype(np.uint8))
        assert mask.mean() == pytest.approx(np.pi * (31 / 64) ** 2, rel=0.03)
        np.testing.assert_allclose(middle(mask), 32, atol=0.1)
        assert not image[~mask].max() > 15 and image[0, 0].max() == 0


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("eye", retina.EYES)
def test_the_disc_is_nasal_of_the_macula(eye, size):
    """At the right in a right eye's photograph, at the left in a left eye's, 15 points and more from the macula."""
    nasal = 1 if eye == "right" else -1
    for seed in range(8):
        plain = picture(NORMAL, seed, size, eye, vessel_strength=0.0).sum(axis=2)
        flat = picture(NORMAL, seed, size, eye, vessel_strength=0.0, macula_depth=0.0).sum(axis=2)
        disc, macula = middle(plain > np.percentile(plain, 98.5)), middle(flat - plain > 60)
        assert 15 < nasal * (disc[0] - macula[0]) < 23 and abs(disc[1] - macula[1]) < 4


def test_vessels_arch_above_and_below_the_macula_and_leave_it_free():
    for seed in range(10):
        change = np.abs(picture(NORMAL, seed) - picture(NORMAL, seed, vessel_strength=0.0)).max(axis=2) > 20
        assert change[4:24, 12:40].mean() > 0.08 and change[42:60, 12:40].mean() > 0.08
        assert not change[30:37, 22:29].any()  # the macula of a right eye is at (25.5, 33)


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("finding", list(retina.FINDINGS)[1:])
def test_a_finding_is_seen(finding, size):
    """With against without, same eye: at least 1 % of the pixels change plainly."""
    for seed in range(6):
        change = np.abs(picture(finding, seed, size) - picture(NORMAL, seed, size)).max(axis=2)
        assert (change > 40).mean() > 0.01


def test_findings_change_the_right_structures():
    for seed in range(8):
        normal = picture(NORMAL, seed, vessel_strength=0.0)
        change = {name: picture(name, seed, vessel_strength=0.0) - normal for name in retina.FINDINGS}
        assert not change[NORMAL].any()
        spots = np.abs(change[DRUSEN]).max(axis=2) > 40
        assert np.hypot(*(middle(spots) - (25.5, 33))) < 6 and change[DRUSEN][spots].mean(axis=0)[1] > 40
        cup = np.abs(change[GLAUCOMA]).max(axis=2) > 10
        assert change[GLAUCOMA].min() > -1 and 0.005 < cup.mean() < 0.025  # a pale ring of at most 6 points radius
        red, green, _ = np.moveaxis(change[RETINOPATHY], 2, 0)
        assert (red < -40).mean() > 0.01 and (green > 30).mean() > 0.004  # blood, lipid
        pale = (change[MYOPIA] + normal)[..., 2] > 150  # the atrophy: large, white, between disc and macula
        assert 0.03 < pale.mean() < 0.2 and 32 < middle(pale)[0] < 46
        assert change[MYOPIA][fov_mask(normal.astype(np.uint8))].mean() > 10


@pytest.mark.parametrize("finding, eye", [("cataract", "left"), (NORMAL, "both"), ("", "right")])
def test_other_findings_and_eyes_are_refused(finding, eye):
    with pytest.raises(UserError, match="findings: normal fundus, drusen"):
        picture(finding, eye=eye)


def test_findings_are_as_frequent_as_stated_in_either_eye():
    rng = np.random.default_rng(5)
    drawn = [retina.draw_findings(rng) for _ in range(20000)]
    wanted = retina.FINDINGS
    assert sum(wanted.values()) == pytest.approx(1)
    for side in range(2):
        counts = Counter(pair[side] for pair in drawn)
        for name, chance in wanted.items():
            assert abs(counts[name] / 20000 - chance) < 4 * np.sqrt(chance * (1 - chance) / 20000)
    equal = retina.SAME + (1 - retina.SAME) * sum(chance**2 for chance in wanted.values())
    assert sum(left == right for left, right in drawn) / 20000 == pytest.approx(equal, abs=0.014)  # 4 standard errors


def test_two_eyes_of_a_patient_are_more_similar_than_two_patients():
    """Mean colour of the field, normal eyes."""

    def colour(seed, eye):
        image = picture(NORMAL, seed, 48, eye)
        return image[fov_mask(image.astype(np.uint8))].mean(axis=0)

    left, right = (np.array([colour(seed, eye) for seed in range(20)]) for eye in retina.EYES)
    within = np.abs(left - right).mean()
    assert within < 0.5 * np.abs(left - np.roll(right, 1, axis=0)).mean()
