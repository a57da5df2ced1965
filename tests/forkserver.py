"""Runs the command line again and again in children of one process that has imported everything, and interrupts them.

The arguments of this script are those of a first run in the process itself, which imports what is imported late. Reads
one request a line from standard input, as JSON, and answers with the exit code and the seconds that it took.
"""

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

from csulora_cli.cli import interrupts
from csulora_cli.cli.main import main

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree"}


class Touches:
    """What this process is about to do to anything below a folder; a signal goes off right before one of these."""

    def __init__(self, folder: str, event: int, number: int) -> None:
        self.names: list[str] = []

        def hook(name: str, args: tuple[Any, ...]) -> None:
            if name in FILE_EVENTS and any(folder in str(arg) for arg in args):
                self.names.append(name)
                if len(self.names) == event:
                    os.kill(os.getpid(), number)

        sys.addaudithook(hook)


def child(request: dict[str, Any]) -> None:
    """One run; never returns. A signal waits until it listens, as if it came then."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    touches = Touches(request["below"], request["event"], request["signal"])
    sys.argv = ["csulora", *request["args"]]
    for number in SIGNALS:  # in the background one may be ignored, and after the first run both are
        signal.signal(number, signal.SIG_DFL)
    interrupts.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        print(json.dumps(touches.names))  # --quiet leaves standard output to us
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


with contextlib.suppress(SystemExit):
    main()
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
for line in sys.stdin:
    request = json.loads(line)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(request)
    if request["seconds"] is not None:
        time.sleep(request["seconds"])
        os.kill(pid, request["signal"])
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)
