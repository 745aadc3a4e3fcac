"""Run scripts where every look outside is refused and noted: `python offline.py NOTES < commands`.

Standard input is a JSON list of commands, each a list of a script and its arguments. Each runs in a process of its own,
forked when the libraries have been imported, whose Python audits every socket call before it is made. The notes are
JSON lines: the number of the command and what it did, or its exit status.
"""

import gc
import json
import os
import runpy
import socket
import sys

from launching import LIBRARIES, ROOT

# by name of an audit event, which of its arguments is the other machine
EVENTS = dict.fromkeys(("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"), 1)
EVENTS |= dict.fromkeys(("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"), 0)
OWN = (None, "localhost", "127.0.0.1", "::1", socket.gethostname())


def note(notes: str, number: int, what: str | int) -> None:
    with open(notes, "a") as file:
        file.write(json.dumps([number, what]) + "\n")


def run(notes: str, number: int, command: list[str]) -> None:
    def refuse(event: str, arguments: tuple) -> None:
        place = EVENTS.get(event)
        if place is None or (place and not isinstance(arguments[place], tuple)):  # a path: a socket of this machine
            return
        host = arguments[place][0] if isinstance(arguments[place], tuple) else arguments[place]
        host = host.decode() if isinstance(host, bytes) else host
        if host not in OWN:
            note(notes, number, f"{event} {host}")
            raise OSError("refused: another machine")

    sys.addaudithook(refuse)
    sys.argv[:], sys.path[:1] = command, [os.path.dirname(os.path.abspath(command[0])), str(ROOT)]
    runpy.run_path(command[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    commands, notes = json.load(sys.stdin), sys.argv[1]
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()
    for number, command in enumerate(commands):
        if (child := os.fork()) == 0:
            run(notes, number, command)
        note(notes, number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
