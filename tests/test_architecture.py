"""The layout of the package: imports point down its floors, few modules at the root, no module imports a script."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from launching import ROOT

PACKAGE = ROOT / "ddpo_pytorch"
FLOORS = (
    {"utils", "stat_tracking"},
    {"data"},
    {"generator", "phantoms", "rating", "prompts"},
    {"judges", "diffusers_patch"},
    {"metrics", "rewards", "sampling", "rollout", "ppo"},
    {"training", "rlhf", "augmentation", "report"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names of what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_down_and_rooms_of_one_floor_form_no_circle():
    assert {room(path) for path in FILES} - {"__init__"} == set(FLOOR) and len(list(PACKAGE.glob("*.py"))) <= 8
    arrows = {name: set() for name in FLOOR}
    for path in (path for path in FILES if room(path) in FLOOR):
        for target in imported(path):
            first, _, rest = target.partition(".")
            assert first not in ("scripts", "tests", "config", "benchmarks"), f"{path} imports {target}"
            other = rest.split(".")[0]
            if first == "ddpo_pytorch" and other != room(path):
                assert FLOOR[other] <= FLOOR[room(path)], f"{path} imports {target}, which is above it"
                arrows[room(path)].add(other)
    TopologicalSorter(arrows).prepare()  # raises CycleError


def test_the_files_that_ci_names_exist():
    """`.ci/run` runs some of them a second time, after the whole suite."""
    groups = re.findall(r"tests/test_\{([\w,]+)\}\.py", (ROOT / ".ci" / "run").read_text())
    names = [name for group in groups for name in group.split(",")]
    assert len(names) > 10 and [name for name in names if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []
