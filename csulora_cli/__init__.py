"""csulora: find the closest safe update to a LoRA adapter and write it as a drop-in adapter.

`fix_adapter(FixSettings(...))` is the product; the command line is one of its callers. `evaluate_adapters(
EvalSettings(...))` measures what came out.
"""

from typing import TYPE_CHECKING, Any

from csulora_cli.version import __version__

if TYPE_CHECKING:
    from csulora_cli.api import fix_adapter
    from csulora_cli.eval_report import EvalReport
    from csulora_cli.evaluation import evaluate_adapters
    from csulora_cli.report import FixReport
    from csulora_cli.settings import EvalSettings, FixSettings

__all__ = ["EvalReport", "EvalSettings", "FixReport", "FixSettings", "__version__", "evaluate_adapters", "fix_adapter"]

_HOMES = {
    "fix_adapter": "api",
    "FixReport": "report",
    "FixSettings": "settings",
    "evaluate_adapters": "evaluation",
    "EvalReport": "eval_report",
    "EvalSettings": "settings",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: torch is not needed to ask for the version."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
