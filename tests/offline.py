"""Run scripts where every look outside is noted and refused: `python offline.py NOTES < commands`.

Standard input is a JSON list of commands, each a list of a script and its arguments. Each runs in a process of its own,
forked when the libraries have been imported, whose Python audits every socket call before it is made. The notes are
JSON lines: the number of the command and what it did, or its exit status. Programs that the scripts start are beyond
this; `unshare -n` in front of the command takes the network from these, too.
"""

import atexit
import fcntl
import ipaddress
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import time
from typing import NoReturn
from urllib.request import urlopen

from launching import LIBRARIES, ROOT

LOOKS = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
NAMES = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}


def is_outside(event: str, arguments: tuple) -> bool:
    """Return whether an audit event concerns another machine."""
    if event in LOOKS:  # of a socket and its address: a Unix socket's path, or a pair
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    else:
        host = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "localhost", socket.gethostname()):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def watch(notes: str, number: int) -> None:
    """From now on, in this process."""

    def hook(event: str, arguments: tuple) -> None:
        if event in LOOKS | NAMES and is_outside(event, arguments):
            note(notes, number, f"{event} {arguments[-1] if event in LOOKS else arguments[0]}")
            raise OSError("refused: another machine")
        if event == "socket.bind" and isinstance(arguments[1], tuple):
            threading.Thread(target=visit, args=[arguments[0]], daemon=True).start()

    sys.addaudithook(hook)


def visit(served: socket.socket) -> None:
    """Look at the page that this process is about to serve, and end it as Ctrl-C does."""
    for _ in range(100):
        time.sleep(0.1)
        try:
            urlopen(f"http://127.0.0.1:{served.getsockname()[1]}/").close()
            break
        except OSError:
            continue
    signal.raise_signal(signal.SIGINT)


def note(notes: str, number: int, what: str | int) -> None:
    with open(notes, "a") as file:
        file.write(json.dumps([number, what]) + "\n")


def run(command: list[str]) -> NoReturn:
    """Be a script, and end as Python does, save for taking the libraries apart."""
    status = 1
    try:
        sys.argv[:], sys.path[:1] = command, [os.path.dirname(os.path.abspath(command[0])), str(ROOT)]
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as ending:
        status = ending.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)


def loopback_up() -> None:
    """In a network of its own, a process's loopback is down at first."""
    with socket.socket() as sock:
        try:
            fcntl.ioctl(sock, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
        except PermissionError:  # it is somebody else's network, and up
            pass


if __name__ == "__main__":
    loopback_up()
    commands = json.load(sys.stdin)
    for name in LIBRARIES:
        __import__(name)
    for number, command in enumerate(commands):
        if (child := os.fork()) == 0:
            watch(sys.argv[1], number)
            run(command)
        note(sys.argv[1], number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
