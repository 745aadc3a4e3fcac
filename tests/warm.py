"""Start scripts without waiting for libraries: `python warm.py SCRIPT ARGUMENT...` stands for `python SCRIPT ...`.

Importing torch, diffusers, transformers and timm takes about six seconds of a script's start, and the tests start some
hundred scripts. A server imports these libraries once and forks a process for each script; it knows nothing of the
project, whose own modules every such process imports itself. A script sees the arguments, environment, working
directory, standard streams and signals of the command that stands for it, and that command ends with its exit status.
Without a server (WARM_SERVER unset), or with settings that the libraries read when they are imported, it is started
in the usual way.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from typing import NoReturn

LIBRARIES = (
    *("torch", "torchvision", "accelerate", "absl.app", "ml_collections.config_flags", "timm", "peft", "scipy.stats"),
    *("diffusers.loaders", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.pipelines"),
    *(
        "transformers.models.clip.modeling_clip",
        "transformers.models.bert.modeling_bert",
        "matplotlib.figure",
        "jinja2",
    ),
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "PYTHONWARNINGS", "PYTHONHASHSEED")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def settings_at_import() -> str:
    """The part of the environment that must be the server's own."""
    return json.dumps({k: v for k, v in os.environ.items() if k.startswith(READ_AT_IMPORT)}, sort_keys=True)


def serve(address: str) -> list[str]:
    """Fork a process for each request until standard input ends. Returns in those processes alone: their arguments."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # or collections would write to, and so copy, all the memory that the processes share
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    clients: dict[socket.socket, int] = {}
    print(settings_at_import(), flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin, *clients], [], [], 0.02 if clients else None)
        if sys.stdin in readable:
            for pid in clients.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for client in readable:
            if client is listener:
                connection, _ = listener.accept()
                request, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                pid = os.fork()
                if pid == 0:
                    for held in (listener, connection, *clients):
                        held.close()
                    return become(json.loads(request), streams)
                for stream in streams:
                    os.close(stream)
                clients[connection] = pid
            else:  # a signal to pass on, or the command was killed
                number = client.recv(1)
                os.kill(clients[client], number[0] if number else signal.SIGKILL)
        for client, pid in list(clients.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del clients[client]
                try:
                    client.send(str(os.waitstatus_to_exitcode(status)).encode())
                except BrokenPipeError:
                    pass
                client.close()


def become(request: dict, streams: list[int]) -> list[str]:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    found = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [os.path.dirname(os.path.abspath(request["arguments"][0])), *filter(None, found.split(os.pathsep))]
    return request["arguments"]


def run(arguments: list[str]) -> NoReturn:
    """Run a script and end as Python does, save for taking the libraries apart, which takes two seconds."""
    status = 0
    try:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ask(address: str, arguments: list[str]) -> int:
    """Have the server run a script, and return its exit status."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    for number in FORWARDED:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    try:
        status = int(connection.recv(16) or -signal.SIGKILL)
    except ConnectionResetError:  # the server has ended
        status = -signal.SIGKILL
    if status < 0:  # it died of a signal, so does this
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        run(serve(sys.argv[2]))
    elif os.environ.get("WARM_SERVER") and os.environ["WARM_SETTINGS"] == settings_at_import():
        sys.exit(ask(os.environ["WARM_SERVER"], sys.argv[1:]))
    else:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
