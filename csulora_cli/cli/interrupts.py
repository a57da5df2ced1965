"""Ctrl-C and SIGTERM. Imports next to nothing: it listens before anything large is imported.

As an exception, either goes wherever the main thread happens to be: libraries swallow it in callbacks and
destructors, or make other errors of it. So it is only raised while there is something to clean up, and it is
remembered: progress raises it again at the next step, and the command line tells it from errors by asking here. At all
other times the process ends at once.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

MESSAGE = "interrupted; what is written is whole or absent"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Listener:
    """The handler of both signals, and what it knows."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_working = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.is_working:
            _end(exit_code(number))
        self.received = number
        raise KeyboardInterrupt


_listener = _Listener()


def listen() -> None:
    """Handle both signals from here on, but for one that whoever started the process lets it ignore."""
    _listener.received = None
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _listener)
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """Ignore both: all is done, and the exit code that says so stays, however long Python takes to close down."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def raised() -> Iterator[None]:
    """Raise KeyboardInterrupt for a signal as long as this is open: there are things to close and to remove."""
    _listener.is_working = True
    try:
        yield
    finally:
        _listener.is_working = False


def received() -> int | None:
    """The number of the signal that was raised, or None."""
    return _listener.received


def check() -> None:
    """Raise a signal again that was raised and got lost.

    Raises:
        KeyboardInterrupt: there is one.
    """
    if _listener.received is not None:
        raise KeyboardInterrupt


def exit_code(number: int) -> int:
    """What a process that a signal has ended exits with: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


def _end(code: int) -> None:
    """End the process without a further step of Python's: some library may be in the middle of its own import."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"error: {MESSAGE}\n".encode())
        if "--json" in sys.argv:
            os.write(1, f'{{"error": {{"message": "{MESSAGE}", "hint": ""}}, "exit_code": {code}}}\n'.encode())
    os._exit(code)


def _unraisable(unraisable: Any) -> None:
    """Python's own hook, which reports exceptions of destructors and the like; a signal in one is not lost."""
    if _listener.received is None or unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
