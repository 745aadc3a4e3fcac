"""Pictures of the fundus phantom, in which every finding is seen, and degradations that grow with their strength."""

import dataclasses
import zipfile

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from scipy import ndimage

from ddpo_pytorch.data.fundus import read_split
from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms.damage import BANDS, KINDS, STRUCTURAL, VISIBLE, degrade, has_one_disc, vessel_contrast

NORMAL, DRUSEN, GLAUCOMA, RETINOPATHY, MYOPIA = retina.FINDINGS


def picture(finding, seed=0, size=64, eye="right", **look):
    """(size, size, 3) float; equal seeds are one eye of one patient."""
    rng = np.random.default_rng(seed)
    patient = dataclasses.replace(retina.draw_look(rng), **look)
    return retina.draw(finding, eye, patient, rng, size).astype(float)


def middle(where):
    """Mean (x, y) of the true pixels, in points of a picture 64 wide."""
    return (np.array(ndimage.center_of_mass(where))[::-1] + 0.5) * 64 / where.shape[1]


def test_the_field_is_a_centred_disc_in_a_black_surround():
    """Its area is that of a circle of radius 31 of 64; the rim, half lit, counts by the threshold of the mask."""
    for seed, size in enumerate((64, 100, 64)):
        image = picture(NORMAL, seed, size)
        mask = fov_mask(image.astype(np.uint8))
        assert mask.mean() == pytest.approx(np.pi * (31 / 64) ** 2, rel=0.03)
        np.testing.assert_allclose(middle(mask), 32, atol=0.1)
        assert not image[~mask].max() > 15 and image[0, 0].max() == 0


@pytest.mark.parametrize("eye", retina.EYES)
def test_the_disc_is_nasal_of_the_macula(eye):
    """At the right in a right eye's photograph, at the left in a left eye's, 15 points and more from the macula."""
    nasal = 1 if eye == "right" else -1
    for seed, size in enumerate((64, 96, 64, 96)):
        plain = picture(NORMAL, seed, size, eye, vessel_strength=0.0).sum(axis=2)
        flat = picture(NORMAL, seed, size, eye, vessel_strength=0.0, macula_depth=0.0).sum(axis=2)
        disc, macula = middle(plain > np.percentile(plain, 98.5)), middle(flat - plain > 60)
        assert 15 < nasal * (disc[0] - macula[0]) < 23 and abs(disc[1] - macula[1]) < 4


def test_findings_change_the_right_structures():
    for seed in range(4):
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


def photograph(seed=0, size=64, finding=NORMAL, **look):
    return picture(finding, seed, size, "left", **look).astype(np.uint8)


def degraded(image, kind, strength, seed=0):
    return degrade(image, kind, strength, np.random.default_rng(seed))


def change(image, kind, strength, seed=0):
    """Mean absolute difference, in levels of 255."""
    return np.abs(degraded(image, kind, strength, seed).astype(float) - image).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_change_grows_with_the_strength_in_the_field_alone_and_looks_equal_at_any_size(kind):
    """From grade 2 to 1 it grows by a third and more. Sizes are seen from afar; noise, which would blur, from near."""
    mild, bad = BANDS[2], BANDS[1]
    assert mild[0] < mild[1] < bad[0] < bad[1] <= 1
    for seed in range(3):
        image = photograph(seed, finding=list(retina.FINDINGS)[seed])
        before, outside = image.copy(), ~fov_mask(image)
        changes = [change(image, kind, strength, seed) for strength in (0.1, *mild, 0.6, *bad)]
        assert changes == sorted(changes) and changes[1] > 0 and changes[4] > 1.33 * changes[2]
        np.testing.assert_array_equal(degraded(image, kind, 1.0)[outside], before[outside])
        np.testing.assert_array_equal(image, before)

    def seen(size, seed):
        image = photograph(seed, size)
        pair = [Image.fromarray(one) for one in (image, degraded(image, kind, 0.9, seed))]
        small = [np.asarray(one if kind == "noise" else one.reduce(size // 64), float) for one in pair]
        return np.abs(small[1] - small[0]).mean()

    near, far = (np.mean([seen(size, seed) for seed in range(3)]) for size in (64, 192))
    assert 0.75 < near / far < 1.33


def test_what_no_retina_looks_like_keeps_the_rim_and_has_no_single_disc():
    image = picture(NORMAL, 1, 128).astype(np.uint8)
    field = fov_mask(image)
    assert has_one_disc(image)
    for kind in STRUCTURAL:
        ruined = degraded(image, kind, 1.0)
        np.testing.assert_array_equal(ruined[~field], image[~field])
        if kind == "swapped":
            np.testing.assert_array_equal(ruined[field], image[field][:, [1, 0, 2]])
        elif kind == "flat":
            assert vessel_contrast(ruined) < VISIBLE < vessel_contrast(image)
            assert ruined[40:80, 40:80].std((0, 1)).max() < 1
        elif kind == "mirrored":
            assert not has_one_disc(ruined) and np.abs(ruined.astype(int) - ruined[:, ::-1]).mean() < 0.1
        else:
            assert sorted(ruined[::16, ::16].reshape(-1)) != sorted(image[::16, ::16].reshape(-1))


def test_blur_is_a_gaussian_of_a_share_of_the_width():
    """Far from the rim it is scipy's filter of 0.04 x strength^1.25 x width; the rim itself stays."""
    x = np.arange(128) - 63.5
    field = np.hypot(x, x[:, None])[..., None] < 0.48 * 128
    noise = np.random.default_rng(0).normal(0, 20, (128, 128, 1))
    image = (field * (128 + noise).clip(0, 255)).astype(np.uint8).repeat(3, axis=2)
    for strength in (0.3, 0.8):
        sigma = 0.04 * strength**1.25 * 128
        expected = ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))
        blurred = degraded(image, "blur", strength)
        np.testing.assert_allclose(blurred[44:84, 44:84], expected[44:84, 44:84], atol=0.51)
    rim = fov_mask(image) & ~ndimage.binary_erosion(fov_mask(image))
    np.testing.assert_array_equal(blurred[rim], image[rim])


def test_erasing_vessels_approaches_the_same_retina_without_vessels():
    for seed in range(5):
        image, bare = photograph(seed), photograph(seed, vessel_strength=0.0)
        erased = [degraded(image, "vessels", strength) for strength in (0.3, 1.0)]
        before, partly, fully = (np.abs(one.astype(float) - bare).mean() for one in (image, *erased))
        assert fully < 0.4 * before < partly < 0.9 * before
        assert vessel_contrast(bare) < 0.35 * vessel_contrast(image)


def test_on_photographs_bad_is_worse_than_mild_and_cataract_hides_the_vessels(shared):
    with zipfile.ZipFile(shared / "data" / "odir-128" / "images.zip") as archive:
        rows = read_split(shared / "data" / "odir-128" / "captions.csv")
        photographs = {}
        for finding in ("normal fundus", "cataract"):
            those = [row.image for row in rows if row.caption.endswith(f" shows {finding}.")][:25]
            photographs[finding] = [np.asarray(Image.open(archive.open(image))) for image in those]
    normal, cataract = ([vessel_contrast(image) for image in part] for part in photographs.values())
    assert np.mean(np.array(normal) > VISIBLE) > 0.9 and np.median(cataract) < 0.5 * np.median(normal)
    for image in photographs["normal fundus"][:4]:
        for kind in KINDS:
            assert change(image, kind, BANDS[1][0]) > 1.25 * change(image, kind, BANDS[2][1]) > 0


def test_other_findings_eyes_and_degradations_are_refused():
    for finding, eye in (("cataract", "left"), (NORMAL, "both")):
        refused("findings: normal fundus, drusen", picture, finding, eye=eye)
    for kind, strength in (("fog", 0.5), ("blur", 0.0), ("noise", float("nan"))):
        refused("blur, noise, exposure, crop, vessels, flat", degraded, photograph(), kind, strength)
