"""csulora: find the closest safe update to a LoRA adapter and write it as a drop-in adapter.

`fix_adapter(FixSettings(...))` is the product; the command line is one of its callers. `evaluate_adapters(
EvalSettings(...))` measures what came out, `compare_methods(CompareSettings(...))` sets it beside every other method.
"""

from typing import TYPE_CHECKING, Any

from csulora_cli.version import __version__

if TYPE_CHECKING:
    from csulora_cli.api import fix_adapter
    from csulora_cli.compare_report import CompareReport
    from csulora_cli.comparison import compare_methods
    from csulora_cli.eval_report import EvalReport
    from csulora_cli.evaluation import evaluate_adapters
    from csulora_cli.report import FixReport
    from csulora_cli.settings import CompareSettings, EvalSettings, FixSettings

__all__ = [
    "CompareReport",
    "CompareSettings",
    "EvalReport",
    "EvalSettings",
    "FixReport",
    "FixSettings",
    "__version__",
    "compare_methods",
    "evaluate_adapters",
    "fix_adapter",
]

_HOMES = {
    "fix_adapter": "api",
    "FixReport": "report",
    "FixSettings": "settings",
    "evaluate_adapters": "evaluation",
    "EvalReport": "eval_report",
    "EvalSettings": "settings",
    "compare_methods": "comparison",
    "CompareReport": "compare_report",
    "CompareSettings": "settings",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: torch is not needed to ask for the version."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
