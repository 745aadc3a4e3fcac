"""Paths: names that lead out of a folder, home folders, empty ones, and the folder a script runs in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import ROOT
from refusals import refused
from script_tools import load_config, save_pictures

from ddpo_pytorch.data import fundus, isic, splits
from ddpo_pytorch.data.sample_folder import PARTS, read_entries, read_log
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms import rating_sets, skin
from ddpo_pytorch.training.checkpoints import MANIFEST, find_damage
from ddpo_pytorch.utils.cli import _find_config, expand, expand_config, expand_flags
from ddpo_pytorch.utils.files import path_fault, path_inside

OUTSIDE = ["../private/secret", "/private/secret", "a/../../secret", "..\\secret", "C:\\secret", "C:x", "\\\\host\\x"]
ISIC = "image,MEL,NV,hair,gel_bubble,ruler,ink\n"


def test_names_lead_out_of_a_folder_or_stay_in_it(tmp_path):
    for name in (*OUTSIDE, "", " ", "./", " /.", "a/..", "a\0b", "a\nb"):
        assert path_fault(name)
        refused(["table.csv line 3", repr(name)], path_inside, tmp_path, name, "table.csv line 3")
    for name in ("sub/a.jpg", "./a.jpg", "..a/b..jpg", "a b", "~/a", "ä.png", ".hidden"):
        assert path_fault(name) is None and path_inside(tmp_path, name, "") == tmp_path / name


@pytest.mark.parametrize("name", [*OUTSIDE, "{folder}/private/secret"])
def test_tables_and_records_name_a_path_that_leads_out(name, tmp_path):
    name, folder = name.format(folder=tmp_path), tmp_path / "images"
    save_pictures(tmp_path, "private/secret.jpg", "secret.jpg", "images/fine.jpg")
    (tmp_path / "isic.csv").write_text(f"{ISIC}fine,1,0,0,0,0,0\n{name},1,0,0,0,0,0\n")
    refused(r"isic.csv' line 3", isic.load_split, tmp_path / "isic.csv", folder)
    (tmp_path / "fundus.csv").write_text(f"path,Text\nfine.jpg,A\n{name}.jpg,B\n")
    refused(r"fundus.csv' line 3", fundus.load_split, tmp_path / "fundus.csv", folder)
    entry = {"prompt": "A", "path_to_img": f"{name}.jpg"}
    (folder / PARTS.replace("*", "0")).write_text(json.dumps(entry) + "\n")
    assert read_entries(folder) == {}
    (folder / "image_log.json").write_text(json.dumps([{"prompt": "A", "path_to_img": "fine.jpg"}, entry]))
    for read in (read_log, read_entries):
        refused("image_log.json' entry 2", read, folder)
    shards = [{"file": name, "sha256": ""}]
    (folder / "index.json").write_text(json.dumps({"captions": ["A"], "images": 1, "shards": shards}))
    refused([repr(name)], LatentShards, folder)
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}}))
    assert f"{MANIFEST} is damaged" in find_damage(folder)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_home_folder_is_expanded_at_the_beginning_only_and_in_flags_that_are_paths(home):
    assert expand("~") == str(home) and expand("~/a b/c") == f"{home}/a b/c"
    assert [expand(path) for path in ("", "a/~/b", "./~", "/~")] == ["", "a/~/b", "./~", "/~"]
    refused("'~nobody-of-this-name/x'.*./~nobody-of-this-name/x", expand, "~nobody-of-this-name/x")
    flags = SimpleNamespace(root="~/a", check="~/b", unpack=None)
    expand_flags(flags, ("root", "unpack"), ("check",))
    assert (flags.root, flags.check, flags.unpack) == (f"{home}/a", f"{home}/b", None)
    refused("--root is empty", expand_flags, SimpleNamespace(root=" "), ("root",))


@pytest.mark.parametrize("scale", ["base", "fundus", "mini"])
def test_no_path_of_a_configuration_keeps_its_tilde(home, scale):
    config = load_config(scale).get_config("" if scale == "base" else "finetune_sd")
    config.base_log_path = "~/out"
    config.sd.latents = "~/latents"
    config.eval.prompts = ("~ 5 mm, a nevus",)
    expand_config(config)
    assert config.logdir == f"{home}/out/logs" and config.metric.cache_dir == f"{home}/out/cache/metrics"
    assert config.sd.latents == f"{home}/latents" and config.eval.prompts == ("~ 5 mm, a nevus",)
    assert "~" not in config.to_json_best_effort().replace("~ 5 mm", "")
    config.base_log_path = "/other"  # what is derived stays derived
    assert config.rlhf.output == "/other/rlhf"


FIELDS = {"train.py": "logdir pretrained.model", "generate.py": "logdir pretrained.model improve.judges"}
FIELDS |= {"train_rlhf.py": "rlhf.output rlhf.ratings rlhf.text_encoder", "extract_dataset_latents.py": "logdir"}
FIELDS["improve.py"] = "improve.output improve.judges improve.csv improve.data_path pretrained.model"


@pytest.mark.parametrize("script", FIELDS)
def test_an_empty_path_is_refused_by_name_and_nothing_is_written(home, run_main, script):
    given = {"base_log_path": "out", "sd.output": "sd", "metric.output": "metrics", "rlhf.ratings": "ratings.csv"}
    given |= {f"improve.{name}": name for name in ("held_out_judges", "csv", "held_out_csv", "data_path")}
    for field in ("base_log_path", *FIELDS[script].split()):
        refused(f"^{field} is empty.*--config.{field}=", run_main, script, "config/base.py", **given | {field: " "})
        assert not any(Path.cwd().iterdir())


TOOLS = {fundus: {"--csv": "table.csv", "--out": "out"}, splits: {"--splits": "splits"}, retina: {"--out": "out"}}
TOOLS |= {rating_sets: {"--csv": "table.csv", "--data_path": "images", "--out": "out"}, skin: {"--out": "out"}}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("bad", ["", "~nobody-of-this-name/x"])
def test_tools_refuse_empty_paths_and_unknown_homes_by_name(home, capsys, tool, bad):
    for name in TOOLS[tool]:
        with pytest.raises(SystemExit) as ended:
            tool.main([f"{option}={value}" for option, value in (TOOLS[tool] | {name: bad}).items()])
        assert ended.value.code == 2 and name in capsys.readouterr().err.splitlines()[-1]
        assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize("tool", [fundus, splits])
def test_tools_report_errors_of_the_system_about_a_path_in_one_line(home, capsys, tool):
    """A table in a file instead of a folder, and one whose folder is a file."""
    Path("a_train.csv").write_text("image,hair,gel_bubble,ruler,ink,MEL,NV\na,0,0,0,0,1,0\n")
    Path("a.png").write_bytes(b"")
    Path("table.csv").write_text("path,Text\n" + "".join(f"{n}.png,drusen\n" for n in range(9)))
    given = {fundus: ["--csv=table.csv", "--out"], splits: ["--splits=.", "--images=.", "--list_missing"]}
    with pytest.raises(SystemExit) as ended:
        tool.main([*given[tool], "table.csv/x"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "'table.csv" in said and said.count("\n") == 1


def test_a_configuration_is_found_from_any_folder(home):
    (home / "own.py").touch()
    script, base = str(ROOT / "scripts" / "eval.py"), str(ROOT / "config" / "base.py")
    assert _find_config([script, "--config=config/base.py:x", "--y"]) == [script, f"--config={base}:x", "--y"]
    assert _find_config([script, "--config", "~/own.py"]) == [script, "--config", f"{home}/own.py"]
    (Path.cwd() / "config").mkdir()
    (Path.cwd() / "config" / "base.py").touch()
    assert _find_config([script, "--config=config/base.py"]) == [script, "--config=config/base.py"]
    refused("nothing.py.*nothing.py", _find_config, [script, "--config=config/nothing.py:x"])
