"""`docs/formats.md`: what was repaired, carried and refused, written from what the tests measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Errors differ in their last digits from machine to machine; these bounds do not.
_BOUNDS = (2e-6, 2e-5)

_HEAD = """# Adapters that csulora reads

The tests write this file (`pytest tests/test_formats.py --write-docs`) and fail when it is stale. PEFT 0.21 makes
every variant on a tiny random host; the error is ‖logits − PEFT's‖ / ‖PEFT's − the host's‖, of the adapter as csulora
reads it and of the repaired one as PEFT loads what was written. "Carried" is what goes along as it was: it is named in
the report, and `--strict` refuses it where it replaces a weight of the host or acts beside the update.
"""

_SPELLINGS = """## Spellings

Each is the same adapter, written otherwise. It comes out as PEFT writes it, bit for bit the repair of what PEFT wrote.
A spelling is taken only if it alone puts every tensor on a module of the host that has the right shape.
"""

_WEIGHTS = """## From weights alone

The weights source (`--unaligned`) finds every weight on disk, also where transformers stores it under another name or
in another form. Repaired in every geometry, and written as PEFT reads it:
"""

_OTHER = """## mlx-lm

`adapters.safetensors` with `lora_a` and `lora_b` is repaired in that layout, on linear layers and embeddings.

## Refused

One line says what is wrong, one what to do; nothing is written. Damaged files and configs are in
`tests/test_adapter.py`.
"""

_LOADED = """## Hosts that are not plain safetensors

Of the prompts source, `eval` and `compare`. The same adapter on each host: the error is that of the adapter as csulora
runs it, against PEFT on the same host.
"""

_HOSTS = """## Hosts that are refused

By `fix`, `eval` and `compare`, before anything is loaded.
"""


@dataclass(frozen=True)
class Row:
    """One good variant as it was measured."""

    name: str
    group: str
    carried: Sequence[str]
    conversions: Sequence[str]
    read_error: float
    written_error: float


def render(
    rows: Sequence[Row],
    spellings: Mapping[str, Sequence[str]],
    refusals: Mapping[str, str],
    loaded: Mapping[str, float],
    hosts: Mapping[str, str],
    weights_source: Iterable[str],
) -> str:
    """The whole file; other hosts with their errors, refusals and refused hosts with what the message says."""
    parts = [_HEAD, f"## Repaired: {len(rows)} variants\n"]
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        parts += [f"### {group}\n", _table(("variant", "carried", "rewritten", "read", "written"), map(_cells, own))]
    parts += [_SPELLINGS, _table(("spelling", "rewritten"), ((name, _join(how)) for name, how in spellings.items()))]
    parts += [_WEIGHTS, "".join(f"- {name}\n" for name in weights_source)]
    parts += [_OTHER, _table(("kind", "the message says"), refusals.items())]
    parts += [_LOADED, _table(("host", "read"), ((name, bound(error)) for name, error in loaded.items()))]
    parts += [_HOSTS, _table(("host", "the message says"), hosts.items())]
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    return row.name, _join(row.carried), _join(row.conversions), bound(row.read_error), bound(row.written_error)


def bound(error: float) -> str:
    """The error as one of a few bounds."""
    return next((f"≤ {limit:.0e}".replace("e-0", "e-") for limit in _BOUNDS if error <= limit), f"{error:.0e}")


def _join(words: Sequence[str]) -> str:
    return "; ".join(words)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
