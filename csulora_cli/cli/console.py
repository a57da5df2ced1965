"""Where output goes: results to stdout, everything else to stderr; bars on a terminal, plain lines elsewhere."""

import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csulora_cli.cli import interrupts
from csulora_cli.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STAGES = {
    "adapter": "reading the adapter",
    "models": "finding the models",
    "host": "loading the host",
    "answers": "answering the benign prompts with the adapter",
    "prompts": "running the prompts",
    "prompts and modules": "running the prompts and solving",
    "displacement": "factorising the displacement",
    "strength": "searching the strength",
    "write": "writing",
    "check": "recomputing from the written file",
    "verify": "verifying",
    "measure": "measuring on held-out prompts",
    "methods": "measuring every method on held-out prompts",
    "judge": "loading the judge",
    "judging": "asking the judge",
    "report": "hashing the inputs",
}
_QUIET_SECONDS = 15.0
_LONGEST_LINE = 10_000


class TerminalProgress:
    """Progress on stderr: a bar on a terminal, else one plain line a stage and now and then one more."""

    def __init__(self, bar: "Progress | None", is_quiet: bool) -> None:
        self._bar = bar
        self._is_quiet = is_quiet
        self._task: TaskID | None = None
        self._name = ""
        self._done = 0
        self._total: int | None = None
        self._spoke_at = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins."""
        interrupts.check()
        self._name, self._done, self._total = STAGES.get(name, name), 0, total
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(self._name, total=total)
        elif not self._is_quiet:
            print(f"{self._name} ...", file=sys.stderr, flush=True)
            self._spoke_at = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        """Steps are done."""
        interrupts.check()
        self._done += steps
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)
        elif not self._is_quiet and time.monotonic() - self._spoke_at > _QUIET_SECONDS:
            of = f" of {self._total}" if self._total else ""
            print(f"{self._name}: {self._done}{of}", file=sys.stderr, flush=True)
            self._spoke_at = time.monotonic()

    def warn(self, message: str) -> None:
        """A warning, also when quiet."""
        text = f"warning: {printable(message, 400)}"
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(is_quiet: bool) -> Iterator[TerminalProgress]:
    """A `TerminalProgress` for the time of a command's work; a signal is raised in it, so that it cleans up.

    What takes time to import is to be imported before.
    """
    if is_quiet or not sys.stderr.isatty():
        with interrupts.raised():
            yield TerminalProgress(None, is_quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with interrupts.raised(), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield TerminalProgress(bar, is_quiet)


def out(text: str = "") -> None:
    """Print a result, line by line as it is: no wrapping, no markup, no colour, and no control character either."""
    for line in text.split("\n"):
        print(printable(line, _LONGEST_LINE), file=sys.stdout)


def wrapped(text: str, indent: str = "") -> str:
    """A sentence in indented lines of 80 columns, names and paths left whole."""
    return textwrap.fill(
        text, 80, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def word(text: str) -> str:
    """One argument of a shell command, fit to print."""
    return shlex.quote(printable(text, 1000))


def wrote(*paths: Path | None) -> None:
    """What was written where, below the tables; nothing if nothing was."""
    written = [path for path in paths if path is not None]
    if written:
        out()
    for index, path in enumerate(written):
        out(f"{'' if index else 'wrote':<12}{word(str(path))}")


def fail(message: str, hint: str) -> None:
    """One line on stderr for what is wrong, and one for what to do; both fit to print."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def json_out(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    import json

    print(json.dumps(document, indent=2, ensure_ascii=True))
