"""How the tests run: each worker on a core of its own, slow files first; fixtures are those of the plugins."""

import gc
import os

import pytest

PLUGINS = ("common_fixtures", "script_tools", "rl_tools", "stage_tools", "judge_tools", "sample_sets", "report_example")
PLUGINS += ("rating_tools", "browser_tools")

# Each worker of pytest-xdist keeps to a core of its own, with all that it starts: processes that share their cores with
# others would wait for each other's threads, several times as long as the work takes.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_configure(config: pytest.Config) -> None:
    """Load the plugins, but not where pytest-xdist only hands out tests: its workers would wait for the imports."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        for name in PLUGINS:
            config.pluginmanager.import_plugin(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is imported is no garbage: collections, of which each training asks for some, need not look at it."""
    gc.freeze()
