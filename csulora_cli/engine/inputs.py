"""What the host feeds into the adapted modules on prompts: grouped, collected in bounded memory, never kept on disk.

Modules that read the same tensor (q, k and v; gate and up) form one group, found by looking, not by name. Only the
groups of one chunk are collected at a time; a forward pass stops as soon as the chunk's last module has been reached.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from csulora_cli.engine.host import Batch, Host
from csulora_cli.errors import HostError
from csulora_cli.promptset import Prompts
from csulora_cli.solver.attenuate import unit_trace_scale
from csulora_cli.text import printable

DEFAULT_BUDGET_BYTES = 3 * 2**30
TURN_WEIGHT = 5.0

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

    def to(self, device: torch.device) -> "Moments":
        """The same on a device."""
        return replace(self, harmful=self.harmful.to(device), benign=self.benign.to(device))


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts of both labels: one list of token ids a prompt.

    Attributes:
        harmful, benign: token ids.
    """

    harmful: list[list[int]]
    benign: list[list[int]]


def encode_prompts(host: Host, prompts: Prompts) -> Encoded:
    """One split's prompts through the host's chat template."""
    return Encoded([host.encode(text) for text in prompts.harmful], [host.encode(text) for text in prompts.benign])


@dataclass(frozen=True)
class Side:
    """The direction prompts of one label, with the weights of their tokens.

    Attributes:
        tokens: token ids, one list a prompt, with an answer at the end or without.
        ends: how many of them are the prompt.
        turn: how many tokens at the end of every prompt are the template's own. The model decides on them how to begin
            its answer, so that each counts `TURN_WEIGHT` times.
    """

    tokens: list[list[int]]
    ends: list[int]
    turn: int

    def weights(self, batch: Batch) -> Tensor:
        """How often each token of a batch counts, (B, T), float32; 0 on padding."""
        ends = torch.tensor([self.ends[row] for row in batch.rows], device=batch.mask.device)[:, None]
        places = torch.arange(batch.mask.shape[1], device=batch.mask.device)[None]
        is_turn = (places < ends) & (places >= ends - self.turn)
        return batch.mask.float() * torch.where(is_turn, TURN_WEIGHT, 1.0)


@dataclass(frozen=True)
class DirectionPrompts:
    """What gives the directions: H from `harmful`, G from `benign`."""

    harmful: Side
    benign: Side

    @classmethod
    def of(cls, prompts: Encoded, answers: Sequence[Sequence[int]] | None = None) -> "DirectionPrompts":
        """Prompts, the benign ones with answers to them (in their order) if there are any."""
        turn = common_end([*prompts.harmful, *prompts.benign])
        benign = (
            [[*prompt, *answer] for prompt, answer in zip(prompts.benign, answers, strict=True)] if answers else None
        )
        return cls(
            Side(prompts.harmful, [len(ids) for ids in prompts.harmful], turn),
            Side(benign or prompts.benign, [len(ids) for ids in prompts.benign], turn),
        )

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens the harmful and the benign side have."""
        return sum(map(len, self.harmful.tokens)), sum(map(len, self.benign.tokens))


def common_end(token_lists: Sequence[Sequence[int]]) -> int:
    """How many tokens all lists end with (all of the shortest list but its first token, at most)."""
    longest = min(map(len, token_lists)) - 1
    count = 0
    while count < longest and len({ids[-1 - count] for ids in token_lists}) == 1:
        count += 1
    return count


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
    host: Host, groups: Sequence[InputGroup], prompts: DirectionPrompts, device: torch.device, advance: Progress
) -> dict[InputGroup, Moments]:
    """Run the prompts once and keep the moments of some groups.

    Args:
        host: without an adapter.
        groups: in the order of execution.
        prompts: the direction prompts.
        device: where the moments are kept and summed (float64).
        advance: called with the number of prompts done.
    """
    return host.batch_size.restarting(lambda tell: _collect(host, groups, prompts, device, tell), advance)


def _collect(
    host: Host, groups: Sequence[InputGroup], prompts: DirectionPrompts, device: torch.device, advance: Progress
) -> dict[InputGroup, Moments]:
    tokens = prompts.tokens
    sides: list[dict[InputGroup, Tensor]] = []
    for side in (prompts.harmful, prompts.benign):
        sums = {group: _Sum(group, uses_tokens(group, tokens), device) for group in groups}
        hooks = {group.members[0]: sums[group].add for group in groups}
        for batch in host.batches(side.tokens):
            watch_inputs(host, batch, side.weights(batch), hooks)
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


def watch_inputs(host: Host, batch: Batch, weights: Tensor, hooks: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Run one batch and hand some modules' inputs, (N, in) in float32, to their hooks.

    Each token is multiplied by the square root of its weight, and left out where that is 0. The pass ends at the last
    of these modules.
    """
    remaining = set(hooks)
    keep = weights > 0
    roots = weights[keep].sqrt()[:, None]

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            hooks[name](inputs[keep.to(inputs.device)].float() * roots.to(inputs.device))
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
    prompts: DirectionPrompts,
    device: torch.device,
    budget_bytes: int,
    advance: Progress,
) -> Iterator[dict[InputGroup, Moments]]:
    """The moments of all groups, one chunk at a time; one forward pass over the prompts a chunk."""
    for chunk in chunks(groups, prompts.tokens, budget_bytes):
        yield collect_moments(host, chunk, prompts, device, advance)
