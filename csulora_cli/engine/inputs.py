"""What the host feeds into the adapted modules on prompts: grouped, collected in bounded memory, never kept on disk.

Modules that read the same tensor (q, k and v; gate and up) form one group, found by looking, not by name. Only the
groups of one chunk are collected at a time; a forward pass stops as soon as the chunk's last module has been reached.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csulora_cli.engine.host import Batch, Host
from csulora_cli.errors import HostError
from csulora_cli.solver.attenuate import unit_trace_scale
from csulora_cli.text import printable

DEFAULT_BUDGET_BYTES = 3 * 2**30

Progress = Callable[[int], None]


class _Stop(Exception):  # noqa: N818 (no error: the pass has seen all that it was made for)
    """The chunk's last module has been reached."""


@dataclass(frozen=True)
class InputGroup:
    """Modules that read the same input.

    Attributes:
        members: module names, in the order in which the host runs them.
        features: the input's width.
    """

    members: tuple[str, ...]
    features: int


@dataclass(frozen=True)
class Moments:
    """One group's inputs on the direction prompts, scaled to trace `in`, float64.

    Attributes:
        harmful, benign: C_h and C_b, (in, in), or H and G, (in, N), as `are_tokens` says.
        are_tokens: False for moments, True for tokens.
    """

    harmful: Tensor
    benign: Tensor
    are_tokens: bool


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts of both labels: one list of token ids a prompt.

    Attributes:
        harmful, benign: token ids.
    """

    harmful: list[list[int]]
    benign: list[list[int]]

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens the harmful and the benign prompts have."""
        return sum(map(len, self.harmful)), sum(map(len, self.benign))

    def with_answers(self, answers: Sequence[Sequence[int]]) -> "Encoded":
        """The same prompts, each benign one followed by an answer to it."""
        benign = [[*prompt, *answer] for prompt, answer in zip(self.benign, answers, strict=True)]
        return Encoded(self.harmful, benign)


def group_modules(host: Host, names: Sequence[str], probe: Sequence[int]) -> list[InputGroup]:
    """Find which modules read the same tensor, by running one prompt. In the order of execution."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            # Holding the tensor keeps its id from being given to another one.
            seen.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return note

    with ExitStack() as stack:
        for name in names:
            stack.callback(host.module(name).register_forward_pre_hook(watch(name)).remove)
        for batch in host.batches([probe]):
            host.run(batch)
    return [InputGroup(tuple(members), tensor.shape[-1]) for tensor, members in seen.values()]


def group_bytes(group: InputGroup, tokens: tuple[int, int]) -> int:
    """Memory that one group's `Moments` take."""
    if uses_tokens(group, tokens):
        return 8 * group.features * sum(tokens)
    return 2 * 8 * group.features**2


def uses_tokens(group: InputGroup, tokens: tuple[int, int]) -> bool:
    """Whether keeping the tokens (Woodbury) is smaller than keeping the moments."""
    return sum(tokens) < group.features


def chunks(groups: Sequence[InputGroup], tokens: tuple[int, int], budget_bytes: int) -> list[list[InputGroup]]:
    """Consecutive groups whose moments fit the budget together (one group at least)."""
    result: list[list[InputGroup]] = []
    used = 0
    for group in groups:
        size = group_bytes(group, tokens)
        if not result or used + size > budget_bytes:
            result.append([])
            used = 0
        result[-1].append(group)
        used += size
    return result


def collect_moments(
    host: Host, groups: Sequence[InputGroup], prompts: Encoded, device: torch.device, advance: Progress
) -> dict[InputGroup, Moments]:
    """Run the prompts once and keep the moments of some groups.

    Args:
        host: without an adapter.
        groups: in the order of execution.
        prompts: the direction prompts.
        device: where the moments are kept and summed (float64).
        advance: called with the number of prompts done.
    """
    tokens = prompts.tokens
    sides: list[dict[InputGroup, Tensor]] = []
    for token_lists in (prompts.harmful, prompts.benign):
        sums = {group: _Sum(group, uses_tokens(group, tokens), device) for group in groups}
        hooks = {group.members[0]: sums[group].add for group in groups}
        for batch in host.batches(token_lists):
            watch_inputs(host, batch, hooks)
            advance(len(batch.rows))
        sides.append({group: total.scaled() for group, total in sums.items()})
    return {group: Moments(sides[0][group], sides[1][group], uses_tokens(group, tokens)) for group in groups}


class _Sum:
    """Adds up one group's inputs: their second moment, or the tokens side by side."""

    def __init__(self, group: InputGroup, keeps_tokens: bool, device: torch.device) -> None:
        self.group = group
        self.features = group.features
        self.device = device
        self.squared_total = 0.0
        self.columns: list[Tensor] | None = [] if keeps_tokens else None
        self.moment = torch.zeros(0 if keeps_tokens else group.features, group.features, dtype=torch.float64).to(device)

    def add(self, tokens: Tensor) -> None:
        """Tokens of one batch, (N, in), float32."""
        self.squared_total += float(torch.linalg.vector_norm(tokens, dim=1).cpu().double().square().sum())
        if self.columns is None:
            self.moment += (tokens.mT @ tokens).to(self.device, torch.float64)
        else:
            self.columns.append(tokens.to(self.device, torch.float64))

    def scaled(self) -> Tensor:
        if not math.isfinite(self.squared_total):
            raise HostError(
                f"the host gives NaN or infinite activations at '{printable(self.group.members[0])}'",
                "Try --dtype float32.",
            )
        scale = unit_trace_scale(self.features, self.squared_total)
        if self.columns is None:
            return self.moment * scale
        columns: Tensor = torch.cat(self.columns).mT * scale**0.5  # (in, N)
        return columns


def watch_inputs(host: Host, batch: Batch, hooks: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Run one batch and hand some modules' inputs on the tokens that count, (N, in) in float32, to their hooks.

    Padding does not count. The pass ends at the last of these modules.
    """
    remaining = set(hooks)
    keep = batch.mask.bool()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_module: nn.Module, args: tuple[Any, ...]) -> None:
            hooks[name](args[0][keep.to(args[0].device)].float())
            remaining.discard(name)
            if not remaining:
                raise _Stop

        return take

    with ExitStack() as stack:
        for name in hooks:
            stack.callback(host.module(name).register_forward_pre_hook(watch(name)).remove)
        try:
            host.run(batch)
        except _Stop:
            return


def iterate_chunks(
    host: Host,
    groups: Sequence[InputGroup],
    prompts: Encoded,
    device: torch.device,
    budget_bytes: int,
    advance: Progress,
) -> Iterator[dict[InputGroup, Moments]]:
    """The moments of all groups, one chunk at a time; one forward pass over the prompts a chunk."""
    for chunk in chunks(groups, prompts.tokens, budget_bytes):
        yield collect_moments(host, chunk, prompts, device, advance)
