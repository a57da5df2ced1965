"""What the host feeds into the adapted sites on prompts: grouped, collected in bounded memory, never kept on disk.

Linear layers that read the same tensor (q, k and v; gate and up) form one group, found by looking, not by name; every
other site is a group of its own. Only the groups of one chunk are collected at a time; a forward pass stops as soon as
the chunk's last site has been reached. In an encoder-decoder model every site reads either the
prompts, which its encoder reads, or what its decoder reads: its prefix with the answers behind it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from csulora_cli.engine.attach import DenseInputs, Inputs, checking_lookups, first_argument, submodule, watching
from csulora_cli.engine.host import Batch, Host, Padded
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.formats.structure import structure_of
from csulora_cli.promptset import Prompts
from csulora_cli.solver.attenuate import contrast, definite, unit_trace_scale
from csulora_cli.text import printable

DEFAULT_BUDGET_BYTES = 3 * 2**30
# Measured on two adapters: at an equal KL to the host on harmful prompts, 25 costs benign prompts less than 5, and 100
# no less than 25.
TURN_WEIGHT = 25.0
# How often an attention sink counts where updates fade. Measured on two adapters: at 1 a repair costs a chat-like task
# more, at 0 it takes larger λ to bring back the last refusals.
FADED_SINK = 0.04

Progress = Callable[[int], None]
Taker = Callable[[Inputs], None]


class _Stop(Exception):  # noqa: N818 (no error: the pass has seen all that it was made for)
    """The chunk's last module has been reached."""


@dataclass(frozen=True)
class InputGroup:
    """Sites that read the same input.

    Attributes:
        members: names of sites, in the order in which the host runs them.
        features: the input's width.
        place: where the first of them lies, to see what they read.
    """

    members: tuple[str, ...]
    features: int
    place: Place

    @property
    def is_one_hot(self) -> bool:
        """Whether the inputs are token ids, each standing for a unit vector."""
        return self.place.kind is Kind.EMBEDDING


class Form(StrEnum):
    """How the inputs of a group are kept."""

    MOMENT = "moment"  # C, (in, in)
    TOKENS = "tokens"  # H, (in, N)
    DIAGONAL = "diagonal"  # the diagonal of C, (in,), where all else is zero

    @property
    def along(self) -> "Form":
        """How Vᵀx is kept where x is kept like this."""
        return Form.TOKENS if self is Form.TOKENS else Form.MOMENT


@dataclass(frozen=True)
class Moments:
    """One group's inputs on the direction prompts, scaled to trace `in` (without that of sinks), float64.

    Attributes:
        faded, benign: C_h and C_b, H and G, or the diagonals of C_h and C_b, as `form` says.
        form: which of them.
    """

    faded: Tensor
    benign: Tensor
    form: Form
    _shared: dict[float, tuple[Tensor | None, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _along: dict[str, tuple[Tensor, "Moments"]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> "Moments":
        """The same on a device."""
        faded, benign = self.faded.to(device), self.benign.to(device)
        return self if faded is self.faded else replace(self, faded=faded, benign=benign)

    def shared(self, protect: float) -> tuple[Tensor | None, Tensor]:
        """What all λ share at β, (in, in) each: C_b made `definite` (None without β), and K. Of form MOMENT alone."""
        if protect not in self._shared:
            benign = definite(self.benign, protect)
            self._shared[protect] = benign, contrast(self.faded, benign, protect)
        return self._shared[protect]

    def along(self, name: str, basis: Tensor) -> "Moments":
        """The same of Vᵀx in the place of x, not scaled again; the last one for a name is kept.

        Args:
            name: of the site whose V it is.
            basis: V, (in, k), orthonormal columns.
        """
        known = self._along.get(name)
        if known is None or known[0] is not basis:
            wide = basis.to(self.faded)
            faded, benign = (self._projected(side, wide) for side in (self.faded, self.benign))
            known = self._along[name] = basis, Moments(faded, benign, self.form.along)
        return known[1]

    def _projected(self, side: Tensor, basis: Tensor) -> Tensor:
        if self.form is Form.TOKENS:
            return basis.mT @ side
        return basis.mT @ (side @ basis if self.form is Form.MOMENT else side[:, None] * basis)


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
            its answer, so that each counts `TURN_WEIGHT` times, and so does the prefix of a decoder.
        sink: how often the first token counts in each prompt where it is the attention sink of all of them. Its energy,
            which can be a thousand times that of all others together, is left out of the trace by which moments are
            scaled. None: there is no such token.
        replies: of so many prompts, the last ones, the answer alone counts.
    """

    tokens: list[list[int]]
    ends: list[int]
    turn: int
    sink: float | None = None
    replies: int = 0

    def batches(self, host: Host) -> Iterator[Batch]:
        """Batches of all of them."""
        return host.batches(self.tokens, ends=self.ends)

    def weights(self, batch: Batch) -> tuple[Tensor, ...]:
        """How often each token of a batch counts, (B, T) for each of its sides, float32; 0 on padding and sinks."""
        is_reply = [row >= self._whole for row in batch.rows]
        prompts = _weights(batch.prompts, self.turn, is_reply)
        if self.sink is not None:
            prompts[:, 0] = 0
        if batch.decoder is None:
            return (prompts,)
        return prompts, _weights(batch.decoder, batch.decoder.ids.shape[1], is_reply)

    def sinks(self, host: Host) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
        """The sink alone, once in the place of all prompts', and how often it counts as in `weights`."""
        if self.sink is not None:
            for batch in host.batches([self.tokens[0][:1]], ends=[1]):
                yield batch, (batch.prompts.mask.float() * self.sink * self._whole,)

    @property
    def count(self) -> int:
        """How many different tokens count."""
        total = sum(map(len, self.tokens)) - sum(self.ends[self._whole :])
        return total if self.sink is None else total - self._whole + 1

    @property
    def _whole(self) -> int:
        """How many prompts count themselves."""
        return len(self.tokens) - self.replies


def _weights(side: Padded, turn: int, is_reply: Sequence[bool]) -> Tensor:
    """1 on every token, `TURN_WEIGHT` on the last `turn` ones before the answer; 0 before a reply. (B, T)."""
    device = side.mask.device
    ends = torch.tensor(side.ends, device=device)[:, None]
    places = torch.arange(side.mask.shape[1], device=device)[None]
    is_asked = places < ends
    weights = torch.where(is_asked & (places >= ends - turn), TURN_WEIGHT, 1.0)
    return side.mask.float() * weights * ~(is_asked & torch.tensor(is_reply, device=device)[:, None])


@dataclass(frozen=True)
class DirectionPrompts:
    """What gives the directions: H from `faded`, where an update is to fade, G from `benign`, where it is to stay."""

    faded: Side
    benign: Side

    @classmethod
    def encode(cls, host: Host, prompts: Prompts) -> "DirectionPrompts":
        """One split's prompts through the host's chat template, without answers.

        Where a token reads those before it alone, a first token that all prompts share is the same input in each of
        them: it tells nothing apart, so that what an update does there is protected and fades last.
        """
        faded, benign = ([host.encode(text) for text in texts] for texts in (prompts.faded, prompts.protected))
        turn = common_end([*faded, *benign])
        has_sink = not host.decoder_prefix and len({ids[0] for ids in (*faded, *benign)}) == 1
        return cls(
            Side(faded, _lengths(faded), turn, FADED_SINK if has_sink else None),
            Side(benign, _lengths(benign), turn, 1.0 if has_sink else None),
        )

    def answered(self, others: list[list[int]], answers: Sequence[Sequence[int]]) -> "DirectionPrompts":
        """The same with answers beside the benign prompts, and with answers alone to other ones.

        Args:
            others: prompts as token ids, which do not count themselves.
            answers: as token ids, to the benign prompts and then to the others, in their order.
        """
        asked = [*self.benign.tokens, *others]
        tokens = [[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)]
        return replace(
            self, benign=replace(self.benign, tokens=tokens, ends=_lengths(asked), replies=len(others))
        )  # fmt: skip

    def fading_on(self, prompts: list[list[int]]) -> "DirectionPrompts":
        """The same with other prompts, as token ids, in the place of those that the update fades on."""
        return replace(self, faded=replace(self.faded, tokens=prompts, ends=_lengths(prompts)))

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens of the faded and the benign side count."""
        return self.faded.count, self.benign.count


def _lengths(prompts: list[list[int]]) -> list[int]:
    return [len(ids) for ids in prompts]


def common_end(token_lists: Sequence[Sequence[int]]) -> int:
    """How many tokens all lists end with (all of the shortest list but its first token, at most)."""
    longest = min(map(len, token_lists)) - 1
    count = 0
    while count < longest and len({ids[-1 - count] for ids in token_lists}) == 1:
        count += 1
    return count


def group_sites(host: Host, sites: Sequence[Site], probe: Sequence[int]) -> list[InputGroup]:
    """Find which sites read the same tensor, by running one prompt. In the order of execution; idle sites are left out.

    Raises:
        HostError: a parameter whose module runs is multiplied in a way that cannot be seen, or what a site reads cannot
            be told to belong to tokens.
    """
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.place.module, []).append(site)
    seen: dict[Any, tuple[Tensor, list[Site]]] = {}

    def watch(own: Sequence[Site]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_argument(args, kwargs)
            for site in own:
                # Holding the tensor keeps its id from being given to another one.
                key = id(inputs) if site.place.kind is Kind.LINEAR else site.name
                members = seen.setdefault(key, (inputs, []))[1]
                if site not in members:
                    members.append(site)

        return note

    used: set[str] = set()
    parameters = {site.place.weight for site in sites if site.place.kind is Kind.PARAMETER}
    if parameters:
        _check_not_shared(host.model, parameters)
        # The other ways to run experts multiply copies of their weights, which nothing tells apart.
        host.model.set_experts_implementation("eager")
    places = {site.name: site.place for site in sites}
    with ExitStack() as stack:
        for module, own in owners.items():
            stack.callback(submodule(host.model, module).register_forward_pre_hook(watch(own), with_kwargs=True).remove)
        # A decoder reads an answer as well, so that no shape is by chance that of a single token.
        for batch in host.batches([[*probe, probe[-1]]], ends=[len(probe)]):
            if batch.decoder is not None:
                stack.enter_context(checking_lookups(host.model, places.values()))
            masks = [side.mask.float() for side in batch.sides]
            with watching(host.model, places, masks, lambda name, _: used.add(places[name].weight)):
                host.run(batch, is_whole=True)
    groups = [(tuple(members), tensor) for tensor, members in seen.values()]
    for (first, *_), _tensor in groups:
        if first.place.kind is Kind.PARAMETER and first.place.weight not in used:
            raise _unseen(first.place.weight)
    return [
        InputGroup(tuple(site.name for site in members), members[0].in_features, members[0].place)
        for members, _ in groups
    ]  # fmt: skip


def _check_not_shared(model: nn.Module, parameters: Set[str]) -> None:
    """Refuse parameters that share their memory with others that are not watched: products are told apart by it."""
    ties = structure_of(model).ties
    for weight in parameters:
        if not parameters >= set(ties.get(weight, ())):
            raise _unseen(weight)


def _unseen(weight: str) -> HostError:
    return HostError(
        f"how '{printable(weight)}' is multiplied cannot be seen in this host",
        "The prompts source cannot repair this parameter; use --unaligned without --protect.",
    )


def group_bytes(group: InputGroup, tokens: tuple[int, int]) -> int:
    """Memory that one group's `Moments` take."""
    return form_bytes(form_of(group, tokens), group.features, tokens)


def form_bytes(form: Form, features: int, tokens: tuple[int, int]) -> int:
    """Memory that `Moments` of inputs of a width take."""
    if form is Form.TOKENS:
        return 8 * features * sum(tokens)
    if form is Form.DIAGONAL:
        return 2 * 8 * features
    return 3 * 8 * features**2  # C_h, C_b and K


def form_of(group: InputGroup, tokens: tuple[int, int]) -> Form:
    """How a group's inputs are kept."""
    if group.is_one_hot:
        return Form.DIAGONAL
    return Form.TOKENS if uses_tokens(group, tokens) else Form.MOMENT


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
    for side in (prompts.faded, prompts.benign):
        sums = {group: _Sum(group, form_of(group, tokens), device) for group in groups}
        takers = {group: sums[group].add for group in groups}
        for batch in side.batches(host):
            watch_inputs(host, batch, side.weights(batch), takers)
            advance(len(batch.rows))
        for batch, weights in side.sinks(host):
            watch_inputs(host, batch, weights, {group: sums[group].add_sink for group in groups})
        sides.append({group: total.scaled() for group, total in sums.items()})
    return {group: Moments(sides[0][group], sides[1][group], form_of(group, tokens)) for group in groups}


class _Sum:
    """Adds up one group's inputs: their second moment, its diagonal, or the tokens side by side."""

    def __init__(self, group: InputGroup, form: Form, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.squared_total = 0.0
        self.columns: list[Tensor] | None = [] if form is Form.TOKENS else None
        shape = {Form.TOKENS: (0,), Form.DIAGONAL: (group.features,), Form.MOMENT: (group.features,) * 2}[form]
        self.total = torch.zeros(shape, dtype=torch.float64).to(device)

    def add(self, inputs: Inputs) -> None:
        """What one batch feeds in."""
        self.squared_total += inputs.squared_total()
        self._add(inputs)

    def add_sink(self, inputs: Inputs) -> None:
        """What a sink feeds in, which the scale does not go by: rounded to float32, it could outweigh all others."""
        self._add(inputs.to(self.device, torch.float64))

    def _add(self, inputs: Inputs) -> None:
        if self.columns is None:
            self.total += inputs.moment().to(self.device, torch.float64)
        elif isinstance(inputs, DenseInputs):
            self.columns.append(inputs.rows.to(self.device, torch.float64))

    def scaled(self) -> Tensor:
        if not math.isfinite(self.squared_total):
            raise HostError(
                f"the host gives NaN or infinite activations at '{printable(self.group.members[0])}'",
                "Try --dtype float32.",
            )
        scale = unit_trace_scale(self.group.features, self.squared_total)
        if self.columns is None:
            return self.total * scale
        rows = torch.cat(self.columns) if self.columns else self.total.new_zeros(0, self.group.features)
        columns: Tensor = rows.mT * scale**0.5  # (in, N)
        return columns


def watch_inputs(
    host: Host, batch: Batch, weights: Sequence[Tensor], takers: Mapping[InputGroup, Callable[[Inputs], None]]
) -> None:
    """Run one batch and hand the inputs of some groups to their takers.

    Each token is multiplied by the square root of its weight, and left out where that is 0. The pass ends at the last
    of these groups; in an encoder-decoder model it goes on, to see that none of them runs again.
    """
    remaining = {group.members[0] for group in takers}
    by_name = {group.members[0]: taker for group, taker in takers.items()}
    places = {group.members[0]: group.place for group in takers}
    # Experts run when a token is sent to them: none of them is known to be the last.
    can_stop = batch.decoder is None and all(place.kind is not Kind.PARAMETER for place in places.values())

    def take(name: str, inputs: Inputs) -> None:
        by_name[name](inputs)
        remaining.discard(name)
        if can_stop and not remaining:
            raise _Stop

    try:
        with watching(host.model, places, weights, take):
            host.run(batch, is_whole=True)
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
