"""The `csulora` command: registers the commands and turns every error into one line, a hint and an exit code."""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from csulora_cli.cli import compare, console, demo, evaluate, fix, interrupts
from csulora_cli.errors import CsuloraError
from csulora_cli.text import printable
from csulora_cli.version import __version__

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # also what typer makes of KeyboardInterrupt, whatever the signal was
EXIT_READER_GONE = 141

app = typer.Typer(
    name="csulora",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="fix", no_args_is_help=True)(fix.fix)
app.command(name="eval", no_args_is_help=True)(evaluate.evaluate)
app.command(name="compare", no_args_is_help=True)(compare.compare)
app.command(name="demo")(demo.demo)

# typer brings its own copy of click; this is the root of what it raises for a wrong command line.
_CommandLineError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(is_asked: bool) -> None:
    if is_asked:
        console.out(f"csulora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Repair LoRA adapters: find the closest safe update and write it as a drop-in adapter."""


def run() -> NoReturn:
    """Run the command line, for `main.main`, and exit."""
    if not sys.stdout.isatty():  # GITHUB_ACTIONS would make typer colour the help also on a pipe
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone: point stdout elsewhere, so that closing it does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_READER_GONE
    sys.exit(code)


def _run() -> int:
    wants_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer swallows it, and exits with 1
            raise stop.__context__ from None
        raise
    except CsuloraError as error:
        return _failed(error.message, error.hint, error.exit_code, wants_json)
    except _CommandLineError as error:
        text = error.format_message()
        if not text:  # what typer raises after it has shown the help by itself
            return EXIT_USAGE
        return _failed(text, "Run csulora --help.", EXIT_USAGE, wants_json)
    except (KeyboardInterrupt, typer.Abort):
        return _failed(interrupts.MESSAGE, "", EXIT_INTERRUPTED, wants_json)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("CSULORA_TRACEBACK") and interrupts.received() is None:
            raise
        return _failed(
            f"unexpected {type(error).__name__}: {error}",
            "This is a bug in csulora. Set CSULORA_TRACEBACK=1 to see where.",
            EXIT_BUG,
            wants_json,
        )


def _failed(message: str, hint: str, code: int, wants_json: bool) -> int:
    if (number := interrupts.received()) is not None:  # whatever others' code has made of it on its way here
        message, hint, code = interrupts.MESSAGE, "", interrupts.exit_code(number)
    message, hint = printable(message, 600), printable(hint, 400)  # also in JSON: some reader prints what it decodes
    console.fail(message, hint)
    if wants_json:
        console.json_out({"error": {"message": message, "hint": hint}, "exit_code": code})
    return code
