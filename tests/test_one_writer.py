"""Every command locks the folder it writes, and removes the partial files of a killed one."""

import pytest
from conftest import run_script
from script_tools import files_of

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked

pytest_plugins = ["script_tools"]
CONFIGURED = {
    "train_sd.py": {"sd__stage": "vae"},
    "extract_dataset_latents.py": {},
    "eval.py": {},
    "generate.py": {},
    "train_rlhf.py": {"rlhf__ratings": "no.csv"},
    "metric.py": {"metric__fake_path": "samples"},
}
FOLDER = {"train_sd.py": "sd__output", "train_rlhf.py": "rlhf__output", "metric.py": "metric__output"}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_second_command_in_a_folder_is_refused(run_main, config_file, tmp_path, name):
    folder = tmp_path / "out"
    place = {FOLDER.get(name, "logdir"): str(folder)}
    with locked(folder):
        before = files_of(tmp_path)
        with pytest.raises(UserError, match="out' is being written") as caught:
            run_main(name, config_file, **CONFIGURED[name], **place)
        assert "\n" not in str(caught.value) and files_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_isic_classifier.py", ["--checkpoint_dir={}", "--data_path=x"]),
        ("train_isic_classifier.py", ["--checkpoint_dir={}", "--data_path=x", "--mode=test"]),
        ("augment.py", ["--output={}", "--data_path=x", "--samples=SD=y"]),
        ("download.py", ["--root={}"]),
        ("download.py", ["--unpack={}"]),
    ],
    ids=["classifier", "test", "augment", "download", "unpack"],
)
def test_a_second_script_in_a_folder_ends_with_one_line(tmp_path, name, options):
    folder = tmp_path / "out"
    with locked(folder):
        result = run_script(name, *(option.format(folder) for option in options))
    assert result.returncode == 2 and f"{str(folder)!r} is being written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and files_of(tmp_path) == {}


@pytest.mark.parametrize("name", ["train_sd.py", "extract_dataset_latents.py", "train_rlhf.py", "generate.py"])
def test_leftovers_go_even_where_the_command_then_fails(run_main, config_file, tmp_path, name):
    for place in (tmp_path, tmp_path / "images" / "hair"):
        place.mkdir(parents=True, exist_ok=True)
        (place / ".shard_00000.safetensors.9999999.tmp").write_bytes(bytes(1000))
    fields = CONFIGURED[name] | {FOLDER.get(name, "logdir"): str(tmp_path), "sd__data_path": ""}
    with pytest.raises((UserError, OSError)):
        run_main(name, config_file, **fields, pretrained__model=str(tmp_path / "nowhere"), dataset__csv="no.csv")
    assert files_of(tmp_path) == {}
