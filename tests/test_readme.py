"""README, docs and runs/: commands and experiments build, examples run; all paths, links, names and settings exist."""

import os
import re
import shlex
import string
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from absl import flags
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import StableDiffusionPipeline
from launching import ROOT
from ml_collections import config_flags
from script_tools import load_config, load_flag_script
from tiny_unet import randomize

from ddpo_pytorch import prompts, rewards
from ddpo_pytorch.generator.lora import ATTENTION, add_lora, lora_parameters, save_lora
from ddpo_pytorch.training.setup import check_training

RUNS = sorted(path for path in (ROOT / "runs").glob("*.sh") if path.stem != "common")
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (README, ROOT / "CONTRIBUTING.md", *DOCS)}
TEXT = "\n".join(PAGES.values())
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
# scripts and modules whose flags are in another file
SOURCES = {"ddpo_pytorch.data.isic": "ddpo_pytorch/data/splits.py", "benchmarks/training.py": "benchmarks/workload.py"}
OTHERS = ("awk", "gdown", "pip", "pip-audit", "pre-commit", "pytest")  # not of this repository


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def commands() -> list[tuple[str, ...]]:
    """Return the commands of all sh blocks as words, with the shell variables of their block filled in."""
    found = []
    for block in blocks("sh", TEXT):
        variables = {}
        for line in block.splitlines():
            line = string.Template(line.split("  #")[0]).safe_substitute(variables)
            if assignment := re.fullmatch(r'(\w+)="?(.*?)"?', line):
                variables[assignment[1]] = assignment[2]
            elif line and not line.startswith("#"):
                found += [tuple(shlex.split(part)) for part in line.split(" && ")]
    (slurm,) = re.findall(r"^# +(sbatch .*)$", (ROOT / "docs" / "slurm.sh").read_text(), re.M)
    return [*found, tuple(shlex.split(slurm))]


COMMANDS = list(dict.fromkeys(commands()))


def options(words: list[str]) -> dict[str, str]:
    """Return long options with their values, "" where the next word is an option itself."""
    pairs = zip(words, [*words[1:], "--"], strict=False)
    return {word: "" if following.startswith("--") else following for word, following in pairs if word[:2] == "--"}


def build(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Return the configuration that a script gets from these arguments, overridden as on the command line."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    default = re.search(r'^define_config\(.*default="(.+)"\)', (ROOT / script).read_text(), re.M)
    values = flags.FlagValues()
    # all files are loaded under one module name, so that an experiment of the last one would answer for this one's
    sys.modules.pop("config_config", None)
    config_flags.DEFINE_config_file("config", str(ROOT / default[1]) if default else None, flag_values=values)
    values(sys.argv, known_only=True)
    return values.config


def parts(command: list[str]) -> tuple[list[str], str, list[str]]:
    """Return a command's words before the script, the script, and the words after it."""
    place = next(i for i, word in enumerate(command) if word.startswith(("scripts/", "docs/slurm.sh")))
    return command[:place], command[place].replace("docs/slurm.sh", "scripts/train.py"), list(command[place + 1 :])


def check_script(command: list[str], monkeypatch: pytest.MonkeyPatch):
    """Assert that a command of a script has flags and a configuration that exist; return the configuration or None."""
    monkeypatch.chdir(ROOT)
    before, script, given = parts(command)
    launcher, source = options(before), (ROOT / script).read_text()
    if file := launcher.get("--config_file"):
        assert load_config_from_file(file).num_machines == int(launcher.get("--num_machines", 1))
    known = load_flag_script(Path(script).name).FLAGS if "define_flags()" in source else ()
    for name in options(given):
        flag = name[2:].split("=")[0]
        assert flag in known or flag.startswith("config") or f'"{flag}"' in source, name
    if "define_config(" not in source:
        return None
    config = build(script, given, monkeypatch)
    if script.endswith("train.py"):
        config.log_with = ""  # trackers are optional packages
        check_training(config)
    return config


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_scripts_build_and_others_exist(command, monkeypatch):
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\w+", word)]  # VARIABLE=value
    if any("scripts/" in word or "/slurm.sh" in word for word in words):
        check_script(command, monkeypatch)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] == "python" or words[:3] == [".venv/bin/python", "-m", "pytest"]:
        name = words[2] if words[1] == "-m" else words[1]
        if name == "pytest":
            return
        file = ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")
        source = file.read_text() + (ROOT / SOURCES.get(name, file)).read_text()
        for option, value in options(words).items():
            assert re.search(rf'"(--)?{option[2:]}"|f"--\{{name\}}"', source), option
            if option == "--set":
                assert value.split("=")[0] in load_config("base").get_config()
    else:
        assert Path(words[0]).name in OTHERS


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_paths_names_and_settings_exist(name):
    page, text = ROOT / name, PAGES[name]
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
    folders = "ddpo_pytorch|scripts|config|tests|benchmarks|docs|runs"
    for path, experiment in re.findall(rf"`((?:{folders})/[\w/.]+)(?::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not experiment or load_config(Path(path).stem).get_config(experiment), experiment
    for function, path in re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", text):
        assert re.search(rf"^(def|class) {function}\b", (ROOT / path).read_text(), re.M), function
    config = load_config("base").get_config()
    block = "sample|train|held_out|early_stop|dataset|eval|metric|sd|rlhf|improve"
    for setting in re.findall(rf"`(?:--config\.)?((?:{block})\.\w+(?:\.\w+)*)(?:=[^`]*)?`", text):
        group, field = setting.split(".", 1)
        assert field in ("py", "jsonl") or field in config[group], setting
    for setting in re.findall(r"`(?:--)?config\.(?!json\b)(\w+)", text):
        assert setting in config, setting


def test_readme_is_short_and_plain():
    assert len(README.read_text().splitlines()) <= 150
    private = r"gone on|go(es)? on with|is told|are told|spoilt|anew|put aside|from nothing"
    assert not re.findall(rf"\b({private})\b", TEXT)


def test_citation_agrees_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version="{citation["version"]}"' in (ROOT / "setup.py").read_text()
    assert citation["preferred-citation"]["title"] in re.sub("[{}]", "", README.read_text())


def test_functions_of_ones_own(tmp_path, monkeypatch):
    """The README's my_module.py gives rewards and prompts to the commands below it."""
    (code,) = [block for block in blocks("python", README.read_text()) if "def reward" in block]
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    alone, mixed = [parts(command) for command in COMMANDS if any("my_module:redness" in word for word in command)]

    config = build(*alone[1:], monkeypatch)
    function = prompts.get_prompt_fn(config.prompt_fn)
    texts = {prompts.draw_prompt(function, seed)[0] for seed in range(8)}
    assert texts == {"a small skin lesion", "a large skin lesion"}
    images = torch.rand(2, 3, 16, 16)
    values, _ = rewards.build_reward(config.reward_fn)(images, ["a", "b"], [{}, {}])
    assert values == pytest.approx(images[:, 0].mean(dim=(1, 2)).numpy())

    config = build(*mixed[1:], monkeypatch)
    assert config.reward_fn_kwargs.redness.to_dict() == {"channel": 1}
    assert [part.weight for part in rewards.parse_spec(config.reward_fn).values()] == [1.0, 0.2]


def test_a_checkpoint_in_diffusers(tmp_path, monkeypatch):
    """The README's load_lora_weights loads our checkpoint."""
    (code,) = [block for block in blocks("python", README.read_text()) if "load_lora_weights" in block]
    (path,) = re.findall(r'load_lora_weights\("(.+)"\)', code)
    monkeypatch.chdir(ROOT)
    (folder,) = re.findall(r'from_pretrained\("(.+)"\)', code)
    unet = StableDiffusionPipeline.from_pretrained(folder).unet
    add_lora(unet, 2, ATTENTION, seed=0)
    randomize(unet)
    file = save_lora(unet, tmp_path / "checkpoint")

    namespace = {}
    exec(code.replace(path, str(file.parent)), namespace)
    loaded = [weight for name, weight in namespace["pipe"].unet.named_parameters() if ".lora_" in name]
    assert all(torch.equal(one, other) for one, other in zip(loaded, lora_parameters(unet), strict=True))


def dry_run(script: Path, **environment: str) -> list[list[str]]:
    """Return what a dry run prints, as words."""
    environment = os.environ | {"DRY_RUN": "1"} | environment
    printed = subprocess.check_output(["bash", script], env=environment, stderr=subprocess.PIPE, text=True)
    return [line.split() for line in printed.splitlines()]


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.stem)
def test_commands_resolve_and_fit_together(script, monkeypatch):
    built = defaultdict(list)
    for command in dry_run(script):
        if any(word.startswith("scripts/") for word in command):
            built[Path(parts(command)[1]).stem].append(check_script(command, monkeypatch))
    names = "train", "metric", "extract_dataset_latents", "eval"
    (train,), (metric,), (real,), samples = (built[name] for name in names)
    assert metric.metric.real_path == real.logdir
    assert [metric.metric.compare_path, metric.metric.fake_path] == [config.logdir for config in samples]
    assert [config.load_from for config in samples] == ["", f"{train.logdir}/{train.run_name}"]
    assert all(len({config.base_log_path for config in (train, metric, real, one)}) == 1 for one in samples)


@pytest.mark.parametrize("target", ["demo", "demo-fundus", "mini-weights"])
def test_commands_of_the_makefile_build(target, monkeypatch):
    printed = subprocess.check_output(["make", "-n", target, "RUN=x"], cwd=ROOT, text=True).replace("\\\n", " ")
    found = [shlex.split(line) for line in printed.splitlines() if "scripts/" in line]
    assert len(found) == {"demo": 5, "demo-fundus": 10, "mini-weights": 6}[target]
    for command in found:
        check_script(command, monkeypatch)


def test_one_gpu_takes_the_size_of_the_card():
    for size in ("16", "80"):
        (train,) = [line for line in dry_run(ROOT / "runs" / "one_gpu.sh", GB=size) if "scripts/train.py" in line]
        assert train[-1].endswith(f"_{size}gb")


def test_a_rerun_skips_finished_stages_and_repeats_the_one_that_failed(tmp_path):
    script = f"OUT={tmp_path}; source {ROOT}/runs/common.sh; cd {tmp_path}\n"
    script += "stage one 1s bash -c 'echo ran >> one'; stage two 1s test -e ready; stage three 1s touch three"
    codes = []
    for _ in range(2):
        codes.append(subprocess.run(["bash", "-c", script], capture_output=True).returncode)
        (tmp_path / "ready").touch()
    assert codes == [1, 0] and (tmp_path / "one").read_text() == "ran\n" and (tmp_path / "three").exists()
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {"one", "two", "three"}
