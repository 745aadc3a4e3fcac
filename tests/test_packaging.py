"""The wheel holds every module and asset, and exactly the imported packages are declared."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from launching import ROOT

# distribution by import name, where they differ
DISTRIBUTIONS = {"absl": "absl-py", "PIL": "pillow"}
DISTRIBUTIONS |= {"torch_fidelity": "torch-fidelity", "huggingface_hub": "huggingface-hub"}
OPTIONAL = {"bitsandbytes", "fastapi", "pydantic", "pydicom", "uvicorn"}


def test_declared_is_what_is_imported():
    imported = set()
    for folder in ("ddpo_pytorch", "scripts", "config"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    keywords = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword))
    (requirements,) = (ast.literal_eval(one.value) for one in keywords if one.arg == "install_requires")
    declared = {re.split(r"[\[>]", requirement)[0] for requirement in requirements}
    imported -= set(sys.stdlib_module_names) | {"ddpo_pytorch"} | OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in imported} | {"wandb"} == declared  # wandb through accelerate


@pytest.mark.slow
def test_wheel_is_complete_and_its_commands_run(tmp_path):
    # from a copy: setuptools leaves a build folder behind, whose stale files would enter the next wheel
    source, installed = tmp_path / "source", tmp_path / "installed"
    for folder in ("ddpo_pytorch", "scripts", "config"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("rl4med_ddpo-*.whl")
    shutil.unpack_archive(wheel, installed, "zip")
    for folder, place in (("ddpo_pytorch", ""), ("scripts", "ddpo_pytorch"), ("config", "ddpo_pytorch")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / place / path.relative_to(ROOT)).is_file(), path
    command = [sys.executable, "-m", "ddpo_pytorch.scripts.generate", "--config=config/mini.py:nothing"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and str(installed / "ddpo_pytorch" / "config" / "mini.py") in result.stderr
    assert "prompt_image_alignment_classifier_isic" in result.stderr and "Traceback" not in result.stderr
