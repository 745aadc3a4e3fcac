"""metric.py on small folders: one and two processes, the columns it leaves out, bad input."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from script_tools import options, succeed

from ddpo_pytorch.data.images import load_image, save_image, write_log
from ddpo_pytorch.data.isic import CAPTIONS, folder_name, labels_of
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.judges.classifier import load_classifier

pytest_plugins = ["script_tools"]


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
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
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
    assert "# Real Sample" in tables[0] and tables[1].count("n/a") == 4  # FID and reward of two sets
    line = json.loads((tmp_path / "one" / "metrics_log.jsonl").read_text())
    values = results[0]["models"]["SD+RL"]
    assert line == {"metrics": {"APR_m": values["APR"], "LPIPS": values["LPIPS"], "FID": None}}
    assert one.stderr.count("FID is n/a") == 1


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
