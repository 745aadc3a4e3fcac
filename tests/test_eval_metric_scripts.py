"""eval.py, metric.py and extract_dataset_latents.py, run for real on tiny models and folders."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, run_script
from ml_collections import config_flags
from safetensors.torch import load_file

from ddpo_pytorch.data.images import load_image, save_image, write_log
from ddpo_pytorch.data.isic import CAPTIONS, LABELS, caption_of, folder_name, labels_of
from ddpo_pytorch.data.sample_log import PartLog, claim_folder, logged, merge_parts, read_settings
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.lora import add_lora, save_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier

PROMPTS = CAPTIONS[6:10]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def options(config: Path, **fields) -> list[str]:
    """Flags of a script; `metric__batch_size=3` stands for --config.metric.batch_size=3."""
    return [f"--config={config}", *(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())]


def succeed(*arguments, **kwargs) -> subprocess.CompletedProcess:
    result = run_script(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr(config_flags, "DEFINE_config_file", lambda *args, **kwargs: None)  # each script defines "config"
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_main(monkeypatch):
    """Function (script, config file, fields): run a script's main in this process. For the many ways to go wrong."""

    def run(name, config_file, **fields):
        config = load_module(config_file).get_config()
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
        module = load_module(ROOT / "scripts" / name)
        module.FLAGS = SimpleNamespace(config=config)
        module.main([])

    threads = torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield run
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[int, Path]:
    folder, paths = tmp_path_factory.mktemp("judges"), {}
    for heads in (4, 6):
        torch.manual_seed(heads)
        paths[heads] = folder / f"h{heads}.safetensors"
        save_classifier(ArtifactClassifier(LABELS[:heads], 32, "tinynet_e"), paths[heads])
    return paths


@pytest.fixture(scope="module")
def run_dir(tiny_pipeline_dir, tmp_path_factory) -> Path:
    """A run folder with one LoRA checkpoint that changes the output."""
    unet = load_pipeline(tiny_pipeline_dir).unet
    add_lora(unet, 2, ["to_q", "to_v"], seed=0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("logs") / "run"
    (folder / "checkpoint_3").mkdir(parents=True)
    save_lora(unet, folder / "checkpoint_3")
    return folder


@pytest.fixture(scope="module")
def config_file(tiny_pipeline_dir, judges, tmp_path_factory) -> Path:
    """An experiment as a user writes one: config/base.py with tiny settings and a prompt file of four captions."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "four.txt").write_text("\n".join(PROMPTS))
    (folder / "tiny.py").write_text(f"""
import runpy

def get_config():
    config = runpy.run_path({str(ROOT / "config" / "base.py")!r})["get_config"]()
    config.pretrained.model = {str(tiny_pipeline_dir)!r}
    config.mixed_precision = "no"
    config.prompt_fn = "from_file"
    config.prompt_fn_kwargs.path = {str(folder / "four.txt")!r}
    config.sample.num_steps = 3
    config.eval.num_samples_per_prompt = 3
    config.eval.batch_size = 5
    config.eval.classifier = {str(judges[6])!r}
    config.metric.classifier = {str(judges[4])!r}
    config.metric.batch_size = 4
    return config
""")
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def samples(config_file, run_dir, tmp_path_factory) -> Path:
    """What one process of eval.py writes for a run folder: 4 prompts x 3 images in batches of 5."""
    folder = tmp_path_factory.mktemp("samples") / "rl"
    succeed("eval.py", *options(config_file, logdir=folder, load_from=run_dir))
    return folder


# --- eval.py ---


@pytest.mark.slow
def test_eval_writes_the_sample_folder(samples, judges, run_dir):
    log = json.loads((samples / "image_log.json").read_text())
    assert [entry["sampleID"] for entry in log] == list(range(12))
    expected = [(prompt, f"images/{folder_name(prompt)}/{i:05d}.png") for prompt in PROMPTS for i in range(3)]
    assert [(entry["prompt"], entry["path_to_img"]) for entry in log] == expected
    assert len({entry["seed"] for entry in log}) == 12
    images = torch.stack([load_image(samples / entry["path_to_img"]) for entry in log])
    assert images.shape == (12, 3, 64, 64) and images.std() > 0.01
    predictions = load_classifier(judges[6]).predict(images).tolist()
    for entry, predicted in zip(log, predictions, strict=True):
        stated = list(labels_of(entry["prompt"]))
        assert entry["labels"] == stated and entry["predictions"] == predicted
        assert entry["reward"] == f"{sum(a == b for a, b in zip(stated, predicted, strict=True)) / 6:.4f}"
    settings = read_settings(samples)
    assert settings["seed"] == 42 and settings["prompts"] == list(PROMPTS)
    about = json.loads((samples / "settings.json").read_text())["about"]
    assert about["load_from"] == str(run_dir) and about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert not list(samples.glob("*.jsonl"))


@pytest.mark.slow
def test_eval_two_processes_write_the_same_bytes(samples, config_file, run_dir, tmp_path):
    succeed("eval.py", *options(config_file, logdir=tmp_path / "two", load_from=run_dir), processes=2)
    assert files_of(tmp_path / "two") == files_of(samples)


@pytest.mark.slow
def test_eval_completes_a_killed_run_to_the_same_bytes(samples, config_file, run_dir, tmp_path):
    folder = tmp_path / "killed"
    arguments = options(config_file, logdir=folder, load_from=run_dir)
    command = [sys.executable, "scripts/eval.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("images/*/*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # what else a kill may leave behind: an image without its line, a line cut short, a temporary file
    missing = [path for path in files_of(samples) if path.endswith(".png") and not (folder / path).exists()]
    if missing:
        (folder / missing[0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / missing[0], folder / missing[0])
    with open(folder / "image_log.part0.jsonl", "a") as file:
        file.write('{"prompt": "a dermo')
    succeed("eval.py", *arguments, processes=2)
    assert files_of(folder) == files_of(samples)


@pytest.mark.slow
def test_eval_leaves_a_finished_folder_alone_and_refuses_other_settings(samples, config_file, run_dir, run_main):
    before = {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")}
    run_main("eval.py", config_file, logdir=str(samples), load_from=str(run_dir))
    assert {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")} == before
    whole = files_of(samples)
    for change, message in (
        ({"seed": 43}, "made with seed 42, now it is 43; choose another logdir"),
        ({"sample__num_steps": 4}, "made with num_steps 3, now it is 4"),
        ({"load_from": ""}, "made with weights_sha256 "),
        ({"prompt_fn": "isic_all", "prompt_fn_kwargs": {}}, "made with prompts "),
    ):
        with pytest.raises(UserError, match=message):
            run_main("eval.py", config_file, **({"logdir": str(samples), "load_from": str(run_dir)} | change))
    assert files_of(samples) == whole


def test_eval_more_images_keep_the_first_ones(config_file, run_main, tmp_path):
    fields = {"eval__batch_size": 2, "sample__num_steps": 2, "eval__classifier": ""}
    run_main("eval.py", config_file, logdir=str(tmp_path / "a"), eval__num_samples_per_prompt=1, **fields)
    first = files_of(tmp_path / "a")
    assert {entry["reward"] for entry in json.loads(first["image_log.json"])} == {None}
    run_main("eval.py", config_file, logdir=str(tmp_path / "a"), eval__num_samples_per_prompt=2, **fields)
    now = files_of(tmp_path / "a")
    assert all(now[path] == data for path, data in first.items() if path.endswith(".png"))
    assert len(json.loads(now["image_log.json"])) == 8
    # the noise of an image depends on its numbers, not on its batch (its pixels then agree up to rounding)
    run_main(
        "eval.py",
        config_file,
        logdir=str(tmp_path / "b"),
        eval__num_samples_per_prompt=2,
        **fields | {"eval__batch_size": 7},
    )
    for path in (path for path in now if path.endswith(".png")):
        difference = load_image(tmp_path / "a" / path) - load_image(tmp_path / "b" / path)
        assert difference.abs().max() < 1.5 / 255


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval__batch_size": 0}, "eval.batch_size is 0; it must be at least 1"),
        ({"eval__num_samples_per_prompt": 0}, "eval.num_samples_per_prompt is 0"),
        ({"sample__eta": -0.5}, "sample.eta is -0.5; it must be at least 0"),
        ({"sample__num_steps": 0}, "sample.num_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16', which needs a GPU"),
        ({"prompt_fn": "nothing"}, "'nothing' is unknown; .*isic_all_idx"),
        ({"prompt_fn_kwargs": {"path": "absent.txt"}}, "'absent.txt' does not exist"),
        ({"load_from": "absent"}, "'absent'"),
        ({"pretrained__model": "/absent"}, "/absent"),
        ({"eval__classifier": "absent.pth"}, "'absent.pth' does not exist"),
    ],
)
def test_eval_bad_input(fields, message, config_file, run_main, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run_main("eval.py", config_file, **{"logdir": str(tmp_path / "x"), **fields})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_eval_refuses_prompts_that_cannot_name_a_folder(config_file, run_main, tmp_path):
    (tmp_path / "bad.txt").write_text("a nevus/melanoma\n")
    with pytest.raises(UserError, match="'a nevus/melanoma' cannot name a folder"):
        run_main(
            "eval.py", config_file, prompt_fn_kwargs={"path": str(tmp_path / "bad.txt")}, logdir=str(tmp_path / "x")
        )


def test_a_folder_of_unknown_origin_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="holds images but no settings.json; choose another logdir"):
        claim_folder(tmp_path, {"seed": 1}, {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        claim_folder(tmp_path, {"seed": 1}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "settings.json"]


def test_the_log_survives_torn_lines_and_counts_only_images_that_exist(tmp_path):
    for name in ("b", "a", "c"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    (tmp_path / "image_log.part1.jsonl").write_text('{"path_to_img": "b.png", "x": 1}\n{"path_to_im')
    with PartLog(tmp_path, 1) as log:
        log.add([{"path_to_img": "a.png"}, {"path_to_img": "gone.png"}])
    assert list(logged(tmp_path)) == ["b.png", "a.png"]
    assert merge_parts(tmp_path, ["a.png", "b.png"]) == 2
    entries = json.loads((tmp_path / "image_log.json").read_text())
    assert entries == [{"sampleID": 0, "path_to_img": "a.png"}, {"sampleID": 1, "path_to_img": "b.png", "x": 1}]
    with PartLog(tmp_path, 0) as log:
        log.add([{"path_to_img": "c.png"}])
    assert merge_parts(tmp_path) == 3 and not list(tmp_path.glob("*.jsonl"))


# --- metric.py ---


def write_samples(folder: Path, counts: dict[str, int], seed: int, size: int = 64) -> Path:
    """A sample folder of noise pictures that differ in colour and contrast."""
    generator = torch.Generator().manual_seed(seed)
    for caption, count in counts.items():
        for index in range(count):
            tone = torch.rand(3, 1, 1, generator=generator)
            image = (tone + 0.3 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
            save_image(folder / "images" / folder_name(caption) / f"{index}.png", image)
    write_log(folder, [])
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    folder, single = tmp_path_factory.mktemp("sets"), CAPTIONS[8]
    return {
        "real": write_samples(folder / "real", {single: 5, CAPTIONS[0]: 6, CAPTIONS[17]: 2}, 0),
        "sd": write_samples(folder / "sd", {single: 4, CAPTIONS[0]: 3, CAPTIONS[31]: 2}, 1),
        "rl": write_samples(folder / "rl", {single: 4, CAPTIONS[0]: 3, CAPTIONS[31]: 4}, 2),
    }


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    torchvision_models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(torchvision_models.alexnet(weights=None).state_dict(), path)
    return path


def metric_fields(sets, alexnet, output) -> dict:
    paths = {"real_path": sets["real"], "fake_path": sets["rl"], "compare_path": sets["sd"], "output": output}
    return {f"metric__{key}": str(value) for key, value in {**paths, "alexnet": alexnet, "inception": ""}.items()}


@pytest.mark.slow
def test_metric_one_and_two_processes(sets, alexnet, judges, config_file, tmp_path):
    one = succeed("metric.py", *options(config_file, **metric_fields(sets, alexnet, tmp_path / "one")))
    succeed("metric.py", *options(config_file, **metric_fields(sets, alexnet, tmp_path / "two")), processes=2)
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for name in ("SD", "SD+RL"):
        first, second = (result["models"][name] for result in results)
        assert first["images"] == second["images"] == {"SD": 9, "SD+RL": 11}[name]
        for key in ("APR", "APR_by_prompt", "label_accuracy", "images_by_prompt", "LPIPS_pairs", "FID"):
            assert first[key] == second[key]
        assert first["FD_judge"] == pytest.approx(second["FD_judge"], rel=1e-5) and first["FD_judge"] > 0
        assert first["LPIPS"] == pytest.approx(second["LPIPS"], rel=1e-6) and 0 < first["LPIPS"] < 1
        assert first["FID"] is None and first["LPIPS_pairs"] == 7  # captions without a real image have no pairs
    # APR against a loop over files
    judge = load_classifier(judges[4])
    right = [
        judge.predict(load_image(path)[None])[0].tolist() == list(labels_of(caption)[:4])
        for caption in (CAPTIONS[8], CAPTIONS[0], CAPTIONS[31])
        for path in sorted((sets["rl"] / "images" / folder_name(caption)).iterdir())
    ]
    assert results[0]["models"]["SD+RL"]["APR"] == sum(right) / len(right) == sum(right) / 11
    assert list(results[0]["models"]) == ["SD", "SD+RL"]
    assert results[0]["real"]["images"] == 13 and results[0]["settings"]["seed"] == 42
    tables = [(tmp_path / "one" / f"{name}.md").read_text() for name in ("table2", "table3")]
    assert all(table in one.stdout for table in tables)
    assert "# Real Sample" in tables[0] and tables[1].count("n/a") == 2
    line = json.loads((tmp_path / "one" / "metrics_log.jsonl").read_text())
    values = results[0]["models"]["SD+RL"]
    assert line == {"metrics": {"APR_m": values["APR"], "LPIPS": values["LPIPS"], "FID": None}}
    assert [text.count("FID is n/a") for text in (one.stderr,)] == [1]


def test_metric_of_the_real_set_against_itself_and_without_one(sets, config_file, run_main, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    fields = {"metric__fake_path": str(sets["real"]), "metric__output": str(tmp_path), "metric__inception": ""}
    fields |= {"metric__alexnet": "", "metric__compare_path": "absent"}
    run_main("metric.py", config_file, metric__real_path=str(sets["real"]), **fields)
    result = json.loads((tmp_path / "metrics.json").read_text())
    own = result["models"]["SD+RL"]
    assert own["FD_judge"] < 1e-9 and own["APR"] == result["real"]["APR"] and own["LPIPS"] is None
    assert list(result["models"]) == ["SD+RL"]
    assert "SD is left out: there are no samples in absent" in caplog.text
    run_main("metric.py", config_file, **fields, metric__prompts=(CAPTIONS[8],))
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["models"]["SD+RL"]["images"] == 5 and result["models"]["SD+RL"]["FD_judge"] is None
    assert "# Real" not in (tmp_path / "table2.md").read_text() and "real" not in result
    assert len((tmp_path / "metrics_log.jsonl").read_text().splitlines()) == 2
    assert "metric.real_path is empty" in caplog.text and "Table 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric__output": ""}, "metric.output is empty; give"),
        ({"metric__fake_path": ""}, "metric.fake_path is empty; give"),
        ({"metric__fake_path": "absent"}, "'absent' is not a sample folder"),
        ({"metric__real_path": "absent"}, "'absent' is not a sample folder"),
        ({"metric__classifier": ""}, "metric.classifier is empty; give"),
        ({"metric__classifier": "absent.pth"}, "'absent.pth' does not exist"),
        ({"metric__batch_size": 0}, "metric.batch_size is 0"),
        ({"metric__prompts": ("a cat",)}, "is not named after one of the 32"),
        ({"metric__prompts": (CAPTIONS[30],)}, "holds no images of the prompts"),
        ({"metric__fake_name": "SD"}, "are both 'SD'; name them apart"),
        ({"metric__inception": "absent.pth"}, "metric.inception='absent.pth' does not exist"),
        ({"metric__alexnet": "absent.pth"}, "metric.alexnet='absent.pth' does not exist"),
    ],
)
def test_metric_bad_input(fields, message, sets, config_file, run_main, tmp_path):
    usual = metric_fields(sets, "", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        run_main("metric.py", config_file, **usual | fields)
    assert not (tmp_path / "out").exists()


def test_metric_refuses_sets_of_different_sizes(sets, config_file, run_main, tmp_path):
    small = write_samples(tmp_path / "small", {CAPTIONS[8]: 3}, 0, size=32)
    usual = metric_fields(sets, "", tmp_path / "out")
    with pytest.raises(UserError, match="is 32 x 32 px, others 64 x 64"):
        run_main("metric.py", config_file, **usual | {"metric__real_path": str(small)})


# --- extract_dataset_latents.py ---


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Seven rows of the official columns; rows 2 and 5 have no image."""
    folder, generator = tmp_path_factory.mktemp("isic"), torch.Generator().manual_seed(0)
    with open(folder / "split.csv", "w", newline="") as file:
        names = ["image", "MEL", "NV", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "label"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in range(7):
            values = {
                "hair": row % 2,
                "gel_bubble": 0,
                "ruler": row // 4,
                "ink": 0,
                "MEL": float(row < 3),
                "NV": float(row >= 3),
            }
            writer.writerow({"image": f"ISIC_{row}", "dark_corner": 1, "gel_border": 0, "label": "x", **values})
            if row not in (2, 5):
                image = torch.rand(3, 40, 50, generator=generator)
                save_image(folder / "image.png", image)
                (folder / "image.png").rename(folder / f"ISIC_{row}{'_downsampled' if row == 3 else ''}.jpg")
    return folder


@pytest.mark.slow
def test_extract_one_and_two_processes(table, config_file, tiny_pipeline_dir, tmp_path):
    fields = {"dataset__csv": table / "split.csv", "dataset__data_path": table, "dataset__image_size": 64}
    result = succeed("extract_dataset_latents.py", *options(config_file, logdir=tmp_path / "one", **fields))
    assert "5 images" in result.stderr and "2 rows" in result.stderr
    succeed("extract_dataset_latents.py", *options(config_file, logdir=tmp_path / "two", **fields), processes=2)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[path] == two[path] for path in one if not path.endswith(".safetensors"))

    log = json.loads(one["image_log.json"])
    assert [entry["sampleID"] for entry in log] == [0, 1, 3, 4, 6]
    assert log[2]["prompt"] == caption_of((1, 0, 0, 0, 0, 1)) and log[2]["image"] == "ISIC_3"
    assert log[2]["dark_corner"] == "1" and log[2]["path_to_img"] == f"images/{folder_name(log[2]['prompt'])}/3.png"
    source = load_image(table / "ISIC_1.jpg", 64)
    assert torch.equal(load_image(tmp_path / "one" / log[1]["path_to_img"]), source)

    latents, other = (load_file(tmp_path / name / "latents.safetensors") for name in ("one", "two"))
    assert latents["row"].tolist() == other["row"].tolist() == [0, 1, 3, 4, 6]
    vae = load_pipeline(tiny_pipeline_dir).vae
    with torch.no_grad():
        posterior = vae.encode(source[None] * 2 - 1).latent_dist
    for name, value in (("mean", posterior.mean), ("logvar", posterior.logvar)):
        assert latents[name].dtype == torch.float16 and latents[name].shape == (5, *value.shape[1:])
        torch.testing.assert_close(latents[name][1].float(), value[0], rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(latents[name], other[name], rtol=2e-3, atol=1e-3)


def test_extract_without_a_model_stores_images_only_and_does_not_repeat_itself(table, config_file, run_main, tmp_path):
    fields = {"dataset__csv": str(table / "split.csv"), "dataset__data_path": str(table), "dataset__image_size": 32}
    fields |= {"pretrained__model": "", "dataset__limit": 3, "logdir": str(tmp_path / "x")}
    run_main("extract_dataset_latents.py", config_file, **fields)
    whole = files_of(tmp_path / "x")
    assert sum(path.endswith(".png") for path in whole) == 3 and "latents.safetensors" not in whole
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    run_main("extract_dataset_latents.py", config_file, **fields)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")} == stamps
    with pytest.raises(UserError, match="made with image_size 32, now it is 64; choose another logdir"):
        run_main("extract_dataset_latents.py", config_file, **fields | {"dataset__image_size": 64})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset__csv": ""}, "dataset.csv is ''"),
        ({"dataset__csv": "absent.csv"}, "'absent.csv' does not exist"),
        ({"dataset__data_path": "absent"}, "'absent' does not exist"),
        ({"dataset__image_size": 0}, "dataset.image_size is 0"),
        ({"pretrained__model": "/absent"}, "/absent"),
    ],
)
def test_extract_bad_input(fields, message, table, config_file, run_main, tmp_path):
    usual = {"dataset__csv": str(table / "split.csv"), "dataset__data_path": str(table), "dataset__image_size": 64}
    with pytest.raises(UserError, match=message):
        run_main("extract_dataset_latents.py", config_file, **{"logdir": str(tmp_path / "x"), **usual, **fields})
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eval.py", "metric.py", "extract_dataset_latents.py"])
def test_user_errors_are_one_line_and_exit_code_2(name, config_file, tmp_path):
    result = run_script(name, *options(config_file, pretrained__model="/absent", logdir=tmp_path / "x"))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()
