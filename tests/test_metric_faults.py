"""metric.py given what it cannot or should not measure: one line that names the file, and what was computed stays."""

import numpy as np
import pytest
from conftest import run_script
from PIL import Image
from sample_sets import write_samples
from script_tools import options

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "sample_sets"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"output": ""}, "metric.output is empty; give"),
        ({"fake_path": ""}, "metric.fake_path is empty; give"),
        ({"fake_path": "absent"}, "'absent' is not a sample folder"),
        ({"real_path": "absent"}, "'absent' is not a sample folder"),
        ({"train_path": "absent"}, "'absent' is no folder with images"),
        ({"classifier": ""}, "metric.classifier is empty; give"),
        ({"classifier": "absent.pth"}, "'absent.pth' does not exist"),
        ({"batch_size": 0}, "metric.batch_size is 0"),
        ({"prompts": ("a cat",)}, "is not named after one of the 32"),
        ({"prompts": (CAPTIONS[30],)}, "holds no images of the prompts"),
        ({"fake_name": "SD"}, "are both 'SD'"),
        ({"fake_name": "real"}, "a model is named 'real'"),
        ({"folders": "SD"}, "'SD' in metric.folders='SD' is not NAME=PATH"),
        ({"folders": "SD=a,SD=a"}, "gives 'a' twice for 'SD'"),
        ({"inception": "absent.pth"}, "metric.inception='absent.pth' does not exist"),
        ({"alexnet": "absent.pth"}, "metric.alexnet='absent.pth' does not exist"),
        ({"extractors": ("clip",)}, "metric.extractors has 'clip'; allowed are inception, judge, dinov2"),
        ({"fid": "fast"}, "metric.fid is 'fast'; allowed are exact, compat"),
    ],
)
def test_bad_settings(overrides, message, config_file, fields, run_main, tmp_path):
    given = fields() | {f"metric__{key}": value for key, value in overrides.items()}
    with pytest.raises(UserError, match=message):
        run_main("metric.py", config_file, **given)
    assert not (tmp_path / "out").exists()


def test_a_judge_with_other_heads_is_refused_and_welcome_as_a_second_one(
    judges, config_file, fields, run_main, tmp_path
):
    with pytest.raises(UserError, match=r"h6.safetensors' has 6 heads .*metric.more_judges=NAME=FILE"):
        run_main("metric.py", config_file, **fields(classifier=judges[6]))
    with pytest.raises(UserError, match="names a judge 'H4', which is taken"):
        run_main("metric.py", config_file, **fields(more_judges=f"H4={judges[6]}"))
    run_main("metric.py", config_file, **fields(more_judges=f"H6={judges[6]}", compare_path=""))
    assert (tmp_path / "out" / "metrics.json").read_text().count('"H6"') >= 2


def picture(mode: str, size: int = 64) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), 99, np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("grey.png", lambda p: picture("L").save(p), r"grey.png' has mode L, not RGB; convert"),
        ("clear.png", lambda p: picture("RGBA").save(p), r"clear.png' has mode RGBA, not RGB"),
        ("small.png", lambda p: picture("RGB", 32).save(p), r"small.png' is 32 x 32 px, most images are 64 x 64"),
        ("text.png", lambda p: p.write_text("no image"), r"text.png' cannot be read as an image; remove"),
        ("empty.jpg", lambda p: p.write_bytes(b""), r"empty.jpg' cannot be read as an image; remove"),
    ],
)
def test_faulty_images_are_named_before_anything_is_computed(
    name, make, message, config_file, fields, run_main, tmp_path
):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 3}, seed=1)
    make(folder / "images" / folder_name(CAPTIONS[0]) / name)
    with pytest.raises(UserError, match=message):
        run_main("metric.py", config_file, **fields(fake_path=folder, compare_path=""))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_an_image_cut_short_is_named_and_what_came_before_is_kept(config_file, fields, run_main, tmp_path):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 12}, seed=1)
    images = sorted((folder / "images" / folder_name(CAPTIONS[0])).iterdir())
    images[-1].write_bytes(images[-1].read_bytes()[:600])
    given = fields(fake_path=folder, compare_path="", real_path="")
    with pytest.raises(UserError, match=rf"{images[-1].name}' cannot be read as an image"):
        run_main("metric.py", config_file, **given)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2 * 4 and not (tmp_path / "out").exists()
    images[-1].unlink()
    run_main("metric.py", config_file, **given)
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.slow
def test_both_processes_end_together_when_one_meets_a_faulty_image(config_file, fields, tmp_path):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 9}, seed=1)
    last = sorted((folder / "images" / folder_name(CAPTIONS[0])).iterdir())[-1]
    last.write_bytes(last.read_bytes()[:600])
    given = options(config_file, **fields(fake_path=folder, compare_path="", real_path=""))
    result = run_script("metric.py", *given, processes=2)
    assert result.returncode != 0 and result.stderr.count(f"error: '{last}' cannot be read as an image") == 2
    assert "Connection closed" not in result.stderr


def test_a_network_that_gives_nan_names_the_image(config_file, fields, run_main, tmp_path):
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e")
    model.model.conv_stem.weight.data *= 1e38  # all are finite in the file, and overflow where they are used
    save_classifier(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"0.png': logits of classifier nan.safetensors, 32 px gives NaN or infinity"):
        run_main("metric.py", config_file, **fields(classifier=tmp_path / "nan.safetensors", compare_path=""))


def test_a_folder_without_images_and_one_of_another_name(config_file, fields, run_main, tmp_path):
    (tmp_path / "empty" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="empty' holds no images"):
        run_main("metric.py", config_file, **fields(fake_path=tmp_path / "empty", compare_path=""))
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 1}, seed=1)
    (folder / "images" / "a_cat").mkdir()
    with pytest.raises(UserError, match="folder 'a_cat' is not named after one of the 32"):
        run_main("metric.py", config_file, **fields(fake_path=folder, compare_path=""))


def test_what_real_images_lack_and_black_and_repeated_samples_are_reported(
    sets, config_file, fields, run_main, tmp_path, caplog
):
    folder = write_samples(tmp_path / "own", {CAPTIONS[0]: 4, CAPTIONS[31]: 2}, seed=1)
    first, *rest = sorted((folder / "images" / folder_name(CAPTIONS[0])).iterdir())
    rest[0].write_bytes(first.read_bytes())
    picture("RGB").point(lambda _: 0).save(rest[1])
    run_main("metric.py", config_file, **fields(fake_path=folder, compare_path=""))
    assert (
        "has no image of 1 generated captions, which count in APR" in caplog.text
        and "NV hair+gel_bubble+ruler+ink" in caplog.text
    )
    assert "1 of 6 images is black" in caplog.text and "1 of 6 images is equal to another one" in caplog.text
    assert "rest on 4 images a set: Frechet distances of few images are biased" in caplog.text
