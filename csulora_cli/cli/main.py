"""Where the process begins: a signal is listened for first; what takes time to import comes after that."""

from typing import NoReturn

from csulora_cli.cli import interrupts


def main() -> NoReturn:
    """Run the command line and exit."""
    interrupts.listen()
    from csulora_cli.cli.app import run

    try:
        run()
    finally:
        interrupts.ignore()
