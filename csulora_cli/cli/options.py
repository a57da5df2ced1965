"""Options that every command has, with the same names, words and panels."""

from pathlib import Path
from typing import Annotated

import typer

OUTPUT = "Output"
MACHINE = "Machine and models"

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
