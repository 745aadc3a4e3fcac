"""Kill train.py before every single write between the end of an epoch and the end of its checkpoint, and go on.

Started by tests/test_killing.py with a file of settings; prints {"points": kills, "epochs": {epochs after which the run
went on: how often}, "faults": texts}. One process prepares the run (models, judges); all training happens in processes
forked from it. One of these trains up to the second epoch's evaluation. For each k it forks one that goes on from there
and is killed before its k-th write; then one forked from the first process, as if by the same command, goes on with
what is left on the disk, and the outcome is compared with a run that nothing has interrupted.
"""

import builtins
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch
from script_tools import load_module

from ddpo_pytorch.training import checkpoints as saving
from ddpo_pytorch.training import run_folder, run_state
from ddpo_pytorch.training.held_out import Evaluation, HeldOut

ROOT = Path(__file__).resolve().parents[1]
WRITES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "remove", "truncate")


def kill_before_write(number: int) -> None:
    """From now on, let `number` writes happen, and no more."""
    left = [number]

    def counted(function, writes=lambda *args, **kwargs: True):
        def call(*args, **kwargs):
            if writes(*args, **kwargs):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return function(*args, **kwargs)

        return call

    def to_write(file, mode="r", *_, **__):
        return any(letter in mode for letter in "wax+")

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(io.open, to_write)
    assert pathlib.io.open is io.open  # what Path.write_text calls
    torch.save = counted(torch.save)
    saving.save_file = counted(safetensors.torch.save_file)


def forked(function, *arguments) -> int:
    """Run a function in a process of its own; how that ended."""
    sys.stdout.flush()
    if not (process := os.fork()):
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder: Path) -> dict:
    """All that a run leaves, without the times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        if path.is_dir() or name.startswith("config"):
            continue
        found[name] = path.read_bytes().decode("latin-1")
        if name == "metrics.jsonl":
            entries = [json.loads(line) for line in found[name].splitlines()]
            timed = ("seconds", "per_second", "gib")
            found[name] = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in entries]
    return found


class Family:
    """Settings, and a training that was prepared once."""

    def __init__(self, settings: dict):
        self.script, self.settings = load_module(ROOT / "scripts" / "train.py"), settings
        self.logs = Path(settings["logdir"])
        self.prepared = self.script.set_up(self.config("prepared"))
        self.script.set_up = lambda config: dataclasses.replace(self.prepared, config=config)
        self.script.save_grid = lambda *arguments: arguments[-1].write_bytes(b"16 images")
        self.script.epoch_time = lambda *_: "no time"
        HeldOut.evaluate = lambda *_, **__: None  # for the following
        run_state.RunState.add_evaluation = self.better_evaluation()

    def config(self, name: str):
        config = load_module(ROOT / "config" / "base.py").get_config()
        config.update_from_flattened_dict(self.settings | {"run_name": name})
        return config

    def train(self, name: str) -> None:
        self.script.train(self.config(name))

    def better_evaluation(self):
        """Every evaluation is better than the one before."""
        add = run_state.RunState.add_evaluation
        return lambda book, _, *others: add(book, Evaluation(book.epoch / 10, 0.5, {}), *others)

    def first_epochs(self, orders: int, answers: int) -> None:
        """Train to the end of the second epoch; then, for each order, let a process save it and die on the way."""
        # without a lock, or those that go on would find the folder taken
        run_folder.locked = lambda folder, _: nullcontext(folder.mkdir(parents=True, exist_ok=True))
        add = run_state.RunState.add_evaluation

        def second_evaluation(book, *arguments):
            if book.epoch == 2:
                shutil.copytree(self.logs / "run", self.logs / "before", symlinks=True)
                while order := os.read(orders, 8):
                    shutil.rmtree(self.logs / "run")
                    shutil.copytree(self.logs / "before", self.logs / "run", symlinks=True)
                    if not (process := os.fork()):
                        self.end_after_saving()
                        kill_before_write(int(order))
                        break
                    os.write(answers, b"%8d" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
                else:
                    os._exit(0)
            return add(book, *arguments)

        run_state.RunState.add_evaluation = second_evaluation
        self.train("run")

    def end_after_saving(self) -> None:
        save = run_state.RunState.save

        def saved(*arguments):
            save(*arguments)
            os._exit(0)

        run_state.RunState.save = saved

    def go_on(self) -> None:
        """The same command again. The exit code is 10 + the epochs that were there."""
        opened = run_state.RunState.open

        def opening(book, *arguments):
            opened(book, *arguments)
            begun.append(book.epoch)

        begun, run_state.RunState.open = [], opening
        self.train("run")
        os._exit(10 + begun[0])


def main(settings: dict) -> dict:
    torch.set_num_threads(1)
    family = Family(settings)
    assert forked(family.train, "whole") == 0
    expected = content(family.logs / "whole")
    (orders_out, orders), (answers, answers_in) = os.pipe(), os.pipe()
    if not os.fork():
        try:
            os.close(orders)
            family.first_epochs(orders_out, answers_in)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(answers_in)
    epochs, faults, number, ended = {}, [], 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        os.write(orders, b"%8d" % number)
        ended = int(os.read(answers, 8))  # nothing, hence an error, when the other process is gone
        begun = forked(family.go_on) - 10
        epochs[begun] = epochs.get(begun, 0) + 1
        outcome = content(family.logs / "run")
        if ended not in (0, -signal.SIGKILL) or outcome != expected:
            names = [name for name in expected | outcome if expected.get(name) != outcome.get(name)]
            faults.append(f"after {number} writes, ended with {ended}, went on from {begun}: {names}")
        number += 1
    os.close(orders)
    return {"points": number - 1, "epochs": epochs, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
