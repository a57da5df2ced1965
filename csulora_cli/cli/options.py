"""Options that several commands have, with the same names, words and panels, and how a settings file joins them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from csulora_cli.settings import read_config_file

OUTPUT = "Output"
MACHINE = "Machine and models"

Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder or a Hub id (org/name, org/name@revision).")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The host: the model that the adapter was trained on. Default: what the adapter names.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html",
        help="Write the results as one HTML page, too, with pictures; it loads nothing from the network.",
        rich_help_panel=OUTPUT,
    ),
]
IsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=OUTPUT)
]
IsQuiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no tables.", rich_help_panel=OUTPUT)
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)]
Dtype = Annotated[
    str | None,
    typer.Option(help="To run models in: auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Let a model's own Python code run.", rich_help_panel=MACHINE),
]


def merged(config: Path | None, command: str, given: dict[str, Any]) -> dict[str, Any]:
    """A command's table of a settings file, under what the command line gives (None: not given).

    Raises:
        UsageError: the file cannot be used.
    """
    values = read_config_file(config, command) if config is not None else {}
    return values | {name: value for name, value in given.items() if value is not None}
