"""Source "prompts": the closest updates that fade on what the host reads in prompts that look harmful.

`Confined` lets them change on some directions of their inputs alone, for keep-out that protects.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from csulora_cli.engine.attach import Factors, Update, unchanged
from csulora_cli.engine.host import Host, solver_device
from csulora_cli.engine.inputs import (
    DEFAULT_BUDGET_BYTES,
    DirectionPrompts,
    Form,
    InputGroup,
    Moments,
    collect_moments,
    form_bytes,
    form_of,
    group_bytes,
    group_sites,
    iterate_chunks,
)
from csulora_cli.engine.memory import is_out_of_memory, release_memory, with_cpu_in_reserve
from csulora_cli.engine.progress import Progress
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Site
from csulora_cli.promptset import Prompts
from csulora_cli.solver.attenuate import by_diagonal, by_moments, by_tokens
from csulora_cli.text import some

# First tokens of each of the adapter's own answers to benign prompts that β protects.
PROTECTED_TOKENS = 48
# The repaired factors of the sites that read one input: (members, moments, β, λ) -> factors by site name.
Solver = Callable[[Sequence[Site], Moments, float, float], dict[str, Factors]]


def protecting(host: Host, prompts: Prompts, adapter: Update, progress: Progress) -> DirectionPrompts:
    """The direction prompts with the adapter's own answers to benign ones: what it does there is protected."""
    bare = DirectionPrompts.encode(host, prompts)
    others = [host.encode(text) for text in prompts.answered]
    asked = [*bare.benign.tokens, *others]
    progress.stage("answers", len(asked))
    with host.adapted(adapter):
        return bare.answered(others, host.generate(asked, PROTECTED_TOKENS, progress.advance))


def closest(members: Sequence[Site], moments: Moments, protect: float, strength: float) -> dict[str, Factors]:
    """The closest updates of the sites that read one input; one factorisation for their stacked A's.

    Args:
        members: sites with the same input.
        moments: of that input.
        protect: β.
        strength: λ.

    Returns:
        A' in float32, B as stored, by site name.
    """
    stacked = torch.cat([site.lora_a.to(moments.faded.device, torch.float64) for site in members])  # (Σr, in)
    solved = _faded(stacked, moments, protect, strength).float().cpu()
    pieces = torch.split(solved, [site.rank for site in members])
    return {site.name: replace(Factors.of(site), lora_a=piece) for site, piece in zip(members, pieces, strict=True)}


class Confined:
    """`closest` for updates that may change on a subspace of their inputs alone: what A reads of V fades as there.

    A' = A + (f(A V) − A V) Vᵀ,   f: `closest` with VᵀC_hV and VᵀC_bV,   B' = B
    """

    def __init__(self, bases: Mapping[str, Tensor]) -> None:
        """Take V by name of the site, (in, k), orthonormal columns; with k = 0 the site stays as it is."""
        self.bases = bases

    def __call__(
        self, members: Sequence[Site], moments: Moments, protect: float, strength: float
    ) -> dict[str, Factors]:
        """A `Solver`; each site is solved on its own."""
        return {site.name: self._closest(site, moments, protect, strength) for site in members}

    def _closest(self, site: Site, moments: Moments, protect: float, strength: float) -> Factors:
        own = self.bases[site.name]
        if own.shape[1] == 0:
            return Factors.of(site)
        basis, lora_a = own.to(moments.faded), site.lora_a.to(moments.faded)
        along = lora_a @ basis  # (r, k)
        change = _faded(along, moments.along(site.name, own), protect, strength) - along
        return replace(Factors.of(site), lora_a=(lora_a + change @ basis.mT).float().cpu())

    def own_bytes(self, groups: Sequence[InputGroup], tokens: tuple[int, int]) -> int:
        """Memory that the moments along V take beside those of the inputs."""
        return sum(
            form_bytes(form_of(group, tokens).along, self.bases[name].shape[1], tokens)
            for group in groups
            for name in group.members
        )


def _faded(lora_a: Tensor, moments: Moments, protect: float, strength: float) -> Tensor:
    """A' of stacked A's, (Σr, in), by the closed form that fits the moments."""
    if moments.form is Form.MOMENT:
        benign, contrasted = moments.shared(protect)
        return by_moments(lora_a, moments.faded, benign, protect, strength, contrasted)
    solve = by_tokens if moments.form is Form.TOKENS else by_diagonal
    return solve(lora_a, moments.faded, moments.benign, protect, strength)


class PromptsPath:
    """The repaired update for any λ, by one solver or several that share the moments.

    Where the moments of all inputs fit the memory budget they are kept, and each λ is solved when it is asked for.
    Where they do not, every λ of `strengths` is solved, by every solver, chunk by chunk while the inputs are at hand.
    """

    def __init__(
        self,
        host: Host,
        sites: Sequence[Site],
        prompts: DirectionPrompts,
        protect: float,
        strengths: Sequence[float],
        progress: Progress,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        solvers: Sequence[Solver] = (closest,),
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.protect = protect
        self._device = solver_device(host.device)
        self.groups = group_sites(host, sites, prompts.faded.tokens[0])
        self._idle = self._idle_sites()
        self._moments: dict[InputGroup, Moments] | None = None  # where they do not fit
        self._solved: dict[tuple[Solver, float], dict[str, Factors]] = {}
        self._host, self._prompts, self._progress = host, prompts, progress
        self._wanted = [(solver, strength) for solver in solvers for strength in strengths]
        shared = self._size(sum)
        own = sum(solver.own_bytes(self.groups, prompts.tokens) for solver in solvers if isinstance(solver, Confined))
        budget_bytes = budget_bytes * shared // (shared + own) if own else budget_bytes
        while not self._is_prepared(budget_bytes):
            budget_bytes = self._relieved(budget_bytes)
            release_memory()

    def _is_prepared(self, budget_bytes: int) -> bool:
        """Collect the moments, and solve as well where they do not fit the budget; False where memory ran out."""
        try:
            if self._size(sum) <= budget_bytes:
                self._collect()
            else:
                self._collect_and_solve(budget_bytes)
        except Exception as problem:
            if not is_out_of_memory(problem) or not self._can_relieve(budget_bytes):
                raise
            return False
        return True

    def _size(self, of_all: Callable[[Iterable[int]], int]) -> int:
        """Bytes of all groups' moments together (`sum`), or of the largest (`max`)."""
        return of_all(group_bytes(group, self._prompts.tokens) for group in self.groups)

    def _collect(self) -> None:
        self._progress.stage("prompts", len(self._prompts.faded.tokens) + len(self._prompts.benign.tokens))
        self._moments = collect_moments(self._host, self.groups, self._prompts, self._device, self._progress.advance)

    def _collect_and_solve(self, budget_bytes: int) -> None:
        self._solved = {key: {} for key in self._wanted}
        self._progress.stage("prompts and modules", None)
        advance = self._progress.advance
        for chunk in iterate_chunks(self._host, self.groups, self._prompts, self._device, budget_bytes, advance):
            for group, moments in chunk.items():
                for (solver, strength), solved in self._solved.items():
                    solved.update(self._solve(solver, group, moments, strength))

    def _can_relieve(self, budget_bytes: int) -> bool:
        """Whether moments can go to the CPU, or fewer of them can be held at once."""
        return self._device.type != "cpu" or budget_bytes > self._size(max)

    def _relieved(self, budget_bytes: int) -> int:
        """Move the moments to the CPU, or hold at most half of them at once. Returns the budget."""
        self._host.batch_size.divisor = 1  # it was not, or not only, the batches that took the memory
        if self._device.type != "cpu":
            self._progress.warn(f"out of memory on {self._device.type}: solving on the CPU, which is slower")
            self._device = torch.device("cpu")
            return budget_bytes
        self._progress.warn("out of memory: solving a part of the modules at a time, which is slower")
        return min(budget_bytes, self._size(sum)) // 2

    def _idle_sites(self) -> dict[str, Factors]:
        """The sites that the prompt does not run, which stay as they are: zero, because there is nothing to repair.

        Raises:
            HostError: another one does not run.
        """
        ran = {name for group in self.groups for name in group.members}
        idle = [site for name, site in self.sites.items() if name not in ran]
        if acting := [site.name for site in idle if not site.is_zero]:
            raise HostError(
                f"{len(acting)} of {len(self.sites)} adapted modules do not run on a text prompt: {some(acting, 2)}",
                "Prompts cannot judge them; use --unaligned without --protect.",
            )
        return unchanged(idle)

    def repaired(self, strength: float, solver: Solver = closest) -> dict[str, Factors]:
        """The update at λ, by module name: at 0 the one as stored, which no solver changes, whatever β is.

        Where the moments did not fit, any other λ must be one of `strengths`.
        """
        if strength == 0:
            return unchanged(self.sites.values())
        key = solver, strength
        if self._moments is not None and key not in self._solved:
            self._solved[key] = {
                name: factors
                for group, moments in self._moments.items()
                for name, factors in self._solve(solver, group, moments, strength).items()
            }
        return self._idle | self._solved[key]

    def _solve(self, solver: Solver, group: InputGroup, moments: Moments, strength: float) -> dict[str, Factors]:
        members = [self.sites[name] for name in group.members]
        return with_cpu_in_reserve(
            lambda device: solver(members, moments.to(device), self.protect, strength),
            self._device,
            self._progress.warn,
        )
