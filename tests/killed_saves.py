"""Kill train.py before every single write between the end of an epoch and the end of its checkpoint, and resume.

Started by tests/test_killing.py with a file of settings; prints {"points": kills, "epochs": {epochs after which the run
was resumed: how often}, "faults": texts}. One process prepares the run (models, judges) and trains up to the second
epoch's evaluation. For each k it forks one that continues there and is killed before its k-th write; then one that
resumes, as if by the same command, what is left on the disk. The outcome is compared with an uninterrupted run.
"""

import builtins
import dataclasses
import io
import itertools
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
from rl_tools import content
from script_tools import load_module, read_config

from ddpo_pytorch.training import checkpoints as saving
from ddpo_pytorch.training import run_folder, run_state
from ddpo_pytorch.training.held_out import Evaluation, HeldOut


def kill_before_write(number: int) -> None:
    """From now on, let `number` writes happen, and no more."""
    writes = itertools.count()

    def counted(function, is_write=lambda *_, **__: True):
        def call(*args, **kwargs):
            if is_write(*args, **kwargs) and next(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "remove", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(io.open, lambda _, mode="r", *__, **___: bool(set(mode) & set("wax+")))
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


def better_evaluation(state, _, *others, add=run_state.RunState.add_evaluation):
    return add(state, Evaluation(state.epoch / 10, 0.5, {}), *others)


def main(settings: dict) -> None:
    torch.set_num_threads(1)
    script, logs = load_module("scripts/train.py"), Path(settings["logdir"])

    def configured(name: str):
        return read_config("config/base.py", settings | {"run_name": name})

    prepared = script.set_up(configured("prepared"))
    script.set_up = lambda config: dataclasses.replace(prepared, config=config)
    script.save_grid = lambda *arguments: arguments[-1].write_bytes(b"16 images")
    HeldOut.evaluate = lambda *_, **__: None  # for `better_evaluation`
    run_state.RunState.add_evaluation = better_evaluation
    assert forked(script.train, configured("whole")) == 0
    expected, run, before, epochs, faults = content(logs / "whole"), logs / "run", logs / "before", {}, []
    # without a lock, or those that resume would find the folder taken
    locked = run_folder.locked
    run_folder.locked = lambda folder, _: nullcontext(folder.mkdir(parents=True, exist_ok=True))

    def resume() -> None:
        """The same command again. The exit code is 10 + the epochs that were there."""
        begun, opened, run_folder.locked = [], run_state.RunState.__init__, locked

        def opening(state, *arguments):
            opened(state, *arguments)
            begun.append(state.epoch)

        run_state.RunState.__init__, run_state.RunState.add_evaluation = opening, better_evaluation
        script.train(configured("run"))
        os._exit(10 + begun[0])

    def second_evaluation(state, *arguments):
        if state.epoch < 2:
            return better_evaluation(state, *arguments)
        shutil.copytree(run, before, symlinks=True)
        for number in itertools.count():
            shutil.rmtree(run)
            shutil.copytree(before, run, symlinks=True)
            if not (process := os.fork()):
                run_state.RunState.save = lambda *saved, save=run_state.RunState.save: (save(*saved), os._exit(0))
                kill_before_write(number)
                return better_evaluation(state, *arguments)
            ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            begun = forked(resume) - 10
            epochs[begun] = epochs.get(begun, 0) + 1
            outcome = content(run)
            if ended not in (0, -signal.SIGKILL) or outcome != expected:
                names = [name for name in expected | outcome if expected.get(name) != outcome.get(name)]
                faults.append(f"after {number} writes, ended with {ended}, resumed from {begun}: {names}")
            if ended != -signal.SIGKILL:
                print(json.dumps({"points": number, "epochs": epochs, "faults": faults}), flush=True)
                os._exit(0)

    run_state.RunState.add_evaluation = second_evaluation
    script.train(configured("run"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
