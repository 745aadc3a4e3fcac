"""metric.py given what it cannot or should not measure: one line that names the file, and what was computed stays."""

import pytest
from launching import run_script
from PIL import Image
from sample_sets import images_of, write_samples
from script_tools import options

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.sample_folder import folder_name, write_log
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "sample_sets"]

A, B = CAPTIONS[0], CAPTIONS[8]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fake_path": ""}, "metric.fake_path is empty; give"),
        ({"real_path": "absent"}, "'absent' is not a sample folder"),
        ({"train_path": "absent"}, "'absent' is not a folder with images"),
        ({"classifier": ""}, "metric.classifier is empty; give"),
        ({"batch_size": 0}, "metric.batch_size is 0"),
        ({"prompts": ("a cat",)}, r"holds no images of the prompts .'a cat'"),
        ({"fake_name": "SD", "compare_path": "{sd}"}, "are both 'SD'"),
        ({"fake_name": "real"}, "a model is named 'real'"),
        ({"folders": "SD"}, "'SD' in metric.folders='SD' is not NAME=PATH"),
        ({"inception": "absent.pth"}, "metric.inception='absent.pth' does not exist"),
        ({"extractors": ("clip",)}, "extractors has 'clip'; allowed are inception, judge, dinov2_vits14"),
        ({"fid": "fast"}, "metric.fid is 'fast'; allowed are exact, compat"),
        ({"output": "{file}/deeper"}, "metric.output=.* cannot be written"),
        ({"cache_dir": "{file}"}, "metric.cache_dir=.* cannot be written"),
        ({"logs": "a={sd}"}, "in metric.logs holds no metrics.jsonl"),
        ({"results": "absent.json"}, "metric.results names 'absent.json'"),
        ({"results": "{sd}/settings.json"}, "settings.json' is damaged .'title' is missing"),
        ({"more_judges": "H4={judge}"}, "names a judge 'H4', which is taken"),
        ({"classifier": "{judge}"}, "h6.safetensors' has 6 heads .*metric.more_judges=NAME=FILE"),
    ],
)
def test_bad_settings(overrides, message, measured, sets, judges, tmp_path):
    (tmp_path / "file").write_text("")
    places = {"sd": sets["sd"], "judge": judges[6], "file": tmp_path / "file"}
    with pytest.raises(UserError, match=message):
        measured(**{key: x.format(**places) if isinstance(x, str) else x for key, x in overrides.items()})
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def log(folder, **entry) -> None:
    write_log(folder, [{"prompt": A, "path_to_img": str(images_of(folder, A)[0].relative_to(folder))} | entry])


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (lambda f, a: Image.new("L", (64, 64)).save(a / "grey.png"), "grey.png' has mode L, not RGB; convert"),
        (lambda f, a: Image.new("RGB", (32, 32)).save(a / "small.png"), "small.png' is 32 x 32 px, most .* 64 x 64"),
        (lambda f, a: (a / "text.png").write_text("no image"), "text.png' cannot be read as an image; remove"),
        (lambda f, a: Image.open(a / "0.png").save(a / "0.jpg"), "0.jpg' .* share a name"),
        (lambda f, a: Image.open(a / "0.png").save(f / "images" / "loose.png"), "loose.png' is not read"),
        (lambda f, a: (f / "images" / "a_cat").mkdir(), "folder 'a_cat' is not named after one of the 32"),
        (lambda f, a: [path.unlink() for path in images_of(f, A)], "holds no images"),
        (lambda f, a: log(f, reward="high"), "the reward 'high' is not a finite number"),
        (lambda f, a: write_log(f, [{"prompt": A}]), "entry 0 has no path_to_img"),
        (lambda f, a: log(f, prompt=B), "is not its folder's"),
    ],
)
def test_faulty_folders_are_named_before_anything_is_computed(disturb, message, measured, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 3}, seed=1)
    disturb(folder, folder / "images" / folder_name(A))
    with pytest.raises(UserError, match=message):
        measured(fake_path=folder, real_path="")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_an_image_cut_short_is_named_and_what_came_before_is_kept(measured, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 12}, seed=1)
    last = images_of(folder, A)[-1]
    last.write_bytes(last.read_bytes()[:600])
    with pytest.raises(UserError, match=rf"{last.name}' cannot be read as an image"):
        measured(fake_path=folder, real_path="")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2 * 4 and not (tmp_path / "out").exists()
    last.unlink()
    assert measured(fake_path=folder, real_path="")["models"]["SD+RL"]["images"] == 11


@pytest.mark.slow
def test_both_processes_end_together_when_one_meets_a_faulty_image(config_file, fields, tmp_path):
    folder = write_samples(tmp_path / "own", {A: 9}, seed=1)
    last = images_of(folder, A)[-1]
    last.write_bytes(last.read_bytes()[:600])
    given = options(config_file, **fields(fake_path=folder, compare_path="", real_path=""))
    result = run_script("metric.py", *given, processes=2)
    assert result.returncode != 0 and result.stderr.count(f"error: '{last}' cannot be read as an image") == 2
    assert "Connection closed" not in result.stderr


def test_a_network_that_gives_nan_names_the_image(measured, tmp_path):
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e")
    model.model.conv_stem.weight.data *= 1e38  # all are finite in the file, and overflow where they are used
    save_classifier(model, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"0.png': logits of classifier nan.safetensors, 32 px gives NaN or infinity"):
        measured(classifier=tmp_path / "nan.safetensors")
