"""metric.py on sets that differ, overlap or hold copies: what it says and what it leaves out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_sets import read, write_samples

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import CAPTIONS, short_caption
from ddpo_pytorch.data.sample_folder import folder_name, write_log
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "sample_sets"]

A, B, C = CAPTIONS[0], CAPTIONS[8], CAPTIONS[31]


@pytest.fixture
def measured(config_file, fields, run_main, tmp_path):
    """Function of overrides: metrics.json of these folders."""

    def run(**overrides) -> dict:
        run_main("metric.py", config_file, **fields(**{"compare_path": ""} | overrides))
        return read(tmp_path / "out")

    return run


def images_of(folder: Path, caption: str) -> list[Path]:
    return sorted((folder / "images" / folder_name(caption)).iterdir())


def test_models_of_different_prompts_are_compared_on_what_they_share(measured, tmp_path, caplog):
    first = write_samples(tmp_path / "first", {A: 6, B: 4}, seed=1)
    second = write_samples(tmp_path / "second", {B: 9, C: 5}, seed=2)
    result = measured(folders=f"SD={first},RL={second}", real_path="")
    (row,) = result["comparisons"]
    assert row["prompts"] == 1 and row["APR"]["n"] == 8  # four of B on each side
    assert row["from_APR"] == result["models"]["SD"]["APR_by_prompt"][B]
    assert row["to_APR"] - row["from_APR"] == pytest.approx(row["APR"]["value"])
    assert "RL has no images of 1 captions that others have" in caplog.text and "MEL plain" in caplog.text


@pytest.mark.parametrize(
    ("role", "how"),
    [
        *(("fake_path", how) for how in ("emptied", "hidden", "removed")),
        *((role, "emptied") for role in ("real_path", "compare_path", "pairs_path")),
    ],
)
def test_a_caption_without_images_is_named_for_one_model_and_any_folder(measured, sets, tmp_path, caplog, role, how):
    folder = write_samples(tmp_path / "own", {A: 3, B: 4}, seed=7, drawn=88)
    for path in images_of(folder, A):
        path.unlink()
    place = folder / "images" / folder_name(A)
    if how == "hidden":
        (place / ".DS_Store").write_text("")
    elif how == "removed":  # the log still has its images
        place.rmdir()
    result = measured(**{"real_path": "", "compare_path": "", "fake_path": sets["sd"]} | {role: folder})
    if role != "pairs_path":
        assert any(str(folder) in line and short_caption(A) in line for line in result["warnings"])
    assert any(str(folder) in line and short_caption(A) in line for line in caplog.messages)


def test_a_prompt_that_was_asked_for_and_has_no_folder_is_named(config_file, fields, run_main, tmp_path):
    folder = write_samples(tmp_path / "own", {B: 3}, seed=7)
    run_main(
        "metric.py", config_file, **fields(fake_path=folder, real_path="", compare_path=""), metric__prompts=(B, C)
    )
    result = read(tmp_path / "out")
    assert [line for line in result["warnings"] if short_caption(C) in line and str(folder) in line]
    assert not [line for line in result["warnings"] if short_caption(B) in line]


def test_the_ceiling_has_the_models_mix_of_prompts(measured, tmp_path):
    real = write_samples(tmp_path / "real", {A: 60, B: 30}, seed=3)
    result = measured(fake_path=write_samples(tmp_path / "own", {A: 3, B: 9, C: 4}, seed=4), real_path=real)
    own, by_prompt = result["models"]["SD+RL"], result["real"]["APR_by_prompt"]
    assert own["ceiling"]["value"] == pytest.approx((3 * by_prompt[A] + 9 * by_prompt[B]) / 12)
    assert own["ceiling_share"] == 12 / 16
    assert own["ceiling"]["value"] != pytest.approx(result["real"]["APR"])


def test_few_prompts_have_no_test_over_prompts(measured, sets):
    (row,) = measured(folders=f"SD={sets['sd']},RL={sets['rl']}")["comparisons"]
    assert row["paired"] and row["p"] is not None and row["p_by_prompt"] is None and "none below 6" in row["test"]


def test_a_rare_prompt_does_not_take_diversity_away(measured, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 6, B: 1}, seed=1)
    block = measured(fake_path=folder, real_path="")["models"]["SD+RL"]
    assert 1 < block["diversity"]["judge"]["vendi"]["value"] <= 6 and block["diversity"]["judge"]["vendi"]["n"] == 6
    lonely = write_samples(tmp_path / "lonely", {A: 1, B: 1}, seed=1)
    block = measured(fake_path=lonely, real_path="")["models"]["SD+RL"]
    assert block["diversity"]["judge"] is None and "no caption has two images" in block["missing"]["diversity"]


def test_numbers_of_several_folders_stay_possible_and_rest_on_one_folder(measured, tmp_path):
    real = write_samples(tmp_path / "real", {A: 12}, seed=9)
    folders = [write_samples(tmp_path / str(n), {A: 10 + n}, seed=n) for n in range(3)]
    part = measured(folders=",".join(f"SD={f}" for f in folders), real_path=real)["models"]["SD"]
    fidelity = part["fidelity"]["judge"]
    assert fidelity["unmatched"]["n_real"] == 12 and fidelity["matched"]["n"] == 10
    assert fidelity["unmatched"]["FID"]["n"] == 10 and fidelity["unmatched"]["FID"]["low"] >= 0
    apr = part["alignment"]["H4"]["APR"]
    assert apr["n"] == part["images"] == 33 and 0 <= apr["low"] <= apr["value"] <= apr["high"] <= 1


def test_folders_of_the_same_images_are_reported(measured, sets, tmp_path, caplog):
    with pytest.raises(UserError, match="gives .* twice for 'SD'"):
        measured(folders=f"SD={sets['sd']},SD={sets['sd']}/")
    twin = write_samples(tmp_path / "twin", {B: 4, A: 3, C: 2}, seed=1)
    with pytest.raises(UserError, match="of 'SD' hold the same images"):
        measured(folders=f"SD={sets['sd']},SD={twin}")
    (row,) = measured(folders=f"SD={sets['sd']},RL={twin}")["comparisons"]
    assert row["APR"]["value"] == 0 and "hold the same images" in caplog.text


def test_copies_and_near_copies_are_reported(measured, tmp_path, caplog):
    """Of ten samples one is a training image, one its JPEG, one mirrored and brighter, one an image of the real set."""
    train, real = (write_samples(tmp_path / name, {A: 20}, seed=n) for n, name in enumerate(("train", "real")))
    fake = write_samples(tmp_path / "fake", {A: 10}, seed=7)
    samples, known, held = images_of(fake, A), images_of(train, A), images_of(real, A)
    save_image(samples[0], load_image(known[3]))
    Image.open(known[4]).save(tmp_path / "x.jpg", quality=90)
    save_image(samples[1], load_image(tmp_path / "x.jpg"))
    save_image(samples[2], (load_image(known[5]) * 1.03).clamp(0, 1).flip(2))
    save_image(samples[3], load_image(held[6]))
    save_image(held[0], load_image(known[7]))  # a leak: it must not make the measure of near 0
    result = measured(fake_path=fake, real_path=real, train_path=train)
    model = result["models"]["SD+RL"]
    about, block = model["folders"][0], model["memorisation"]["thumbnail"]
    assert about["copies_of_training_images"] == 1 and about["near_copies_of_training_images"] == 3
    assert about["copies_of_real_images"] == 1 and block["threshold"] > 0.003
    assert block["share_closer"]["value"] >= 0.3
    found = {Path(pair["path"]).name: Path(pair["train"]).name for pair in block["closest"][:3]}
    assert found == {s.name: k.name for s, k in zip(samples[:3], known[3:6], strict=True)}
    for text in (
        "1 of 20 real images is copies or near copies of training images",
        "1 of 10 images is training images to the pixel",
        "3 of 10 images are copies or near copies (by thumbnail) of training images",
        "1 of 10 images is images of the real folder to the pixel",
    ):
        assert text in caplog.text, text


def test_training_images_behind_a_link_count(measured, sets, tmp_path):
    write_samples(tmp_path / "elsewhere", {A: 5}, seed=1)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "back").symlink_to(tmp_path / "train")
    save_image(tmp_path / "train" / "one.png", load_image(images_of(tmp_path / "elsewhere", A)[0]))
    assert measured(train_path=tmp_path / "train")["sets"]["train"]["images"] == 6


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-20])])
def test_a_damaged_cache_is_made_again(measured, tmp_path, caplog, damage):
    folder = write_samples(tmp_path / "own", {A: 6}, seed=1)
    before = measured(fake_path=folder, real_path="")["models"]
    for path in (tmp_path / "cache").rglob("*.npy"):
        damage(path)
    assert (
        measured(fake_path=folder, real_path="")["models"] == before and "is damaged and computed again" in caplog.text
    )


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (
            lambda f: Image.open(images_of(f, A)[0]).save(images_of(f, A)[0].with_suffix(".jpg")),
            "0.jpg' .* share a name",
        ),
        (lambda f: Image.open(images_of(f, A)[0]).save(images_of(f, A)[0].with_suffix(".webp")), "0.webp' is not read"),
        (lambda f: Image.open(images_of(f, A)[0]).save(f / "images" / "loose.png"), "loose.png' is not read"),
        (lambda f: (f / "images" / folder_name(A) / "deeper").mkdir(), "deeper' is not read"),
        (lambda f: log(f, reward="high"), "the reward 'high' is no finite number"),
        (lambda f: write_log(f, [{"prompt": A}]), "entry 0 has no path_to_img"),
        (lambda f: log(f, reward="nan"), "the reward 'nan' is no finite number"),
        (lambda f: log(f, prompt=B), "is not that of its folder"),
    ],
)
def test_what_cannot_be_read_or_contradicts_itself(disturb, message, measured, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 3}, seed=1)
    disturb(folder)
    with pytest.raises(UserError, match=message):
        measured(fake_path=folder, real_path="")
    assert not (tmp_path / "out").exists()


def log(folder: Path, **entry) -> None:
    path = str(images_of(folder, A)[0].relative_to(folder))
    write_log(folder, [{"prompt": A, "path_to_img": path} | entry])


def test_logged_images_that_are_absent_are_reported(measured, tmp_path, caplog):
    folder = write_samples(tmp_path / "own", {A: 3}, seed=1)
    write_log(folder, [{"prompt": A, "path_to_img": f"images/{folder_name(A)}/gone.png"}])
    (folder / "images" / ".hidden").mkdir()
    assert measured(fake_path=folder, real_path="")["models"]["SD+RL"]["images"] == 3
    assert "image_log.json lists 1 images that are absent" in caplog.text


def test_places_and_names_that_cannot_be_used(measured, judges, sets, tmp_path):
    (tmp_path / "file").write_text("")
    for overrides, message in (
        ({"output": tmp_path / "file" / "deeper"}, "metric.output=.* cannot be written"),
        ({"cache_dir": tmp_path / "file"}, "metric.cache_dir=.* cannot be written"),
        ({"logs": f"a={tmp_path}"}, "in metric.logs holds no metrics.jsonl"),
        ({"more_judges": f"pixels={judges[6]}"}, "names a judge 'pixels', which is taken"),
    ):
        with pytest.raises(UserError, match=message):
            measured(**overrides)
    assert np.all([not (tmp_path / name).exists() for name in ("out", "cache")])
