"""Source "prompts": the closest updates that fade on what the host reads in harmful prompts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.host import Host, solver_device
from csulora_cli.engine.inputs import (
    DEFAULT_BUDGET_BYTES,
    DirectionPrompts,
    Form,
    InputGroup,
    Moments,
    collect_moments,
    group_bytes,
    group_sites,
    iterate_chunks,
)
from csulora_cli.engine.progress import Progress
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Site
from csulora_cli.solver.attenuate import by_diagonal, by_moments, by_tokens
from csulora_cli.text import some


class PromptsPath:
    """The repaired update for any λ.

    Where the moments of all inputs fit the memory budget they are kept, and each λ is solved when it is asked for.
    Where they do not, every λ of `strengths` is solved chunk by chunk while the inputs are at hand.
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
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.protect = protect
        self._device = solver_device(host.device)
        self.groups = group_sites(host, sites, prompts.harmful.tokens[0])
        self._check_all_ran()
        self._moments: dict[InputGroup, Moments] = {}
        self._solved: dict[float, dict[str, Factors]] = {}
        total = len(prompts.harmful.tokens) + len(prompts.benign.tokens)
        fits = sum(group_bytes(group, prompts.tokens) for group in self.groups) <= budget_bytes
        if fits:
            progress.stage("prompts", total)
            self._moments = collect_moments(host, self.groups, prompts, self._device, progress.advance)
            return
        self._solved = {strength: {} for strength in strengths}
        progress.stage("prompts and modules", None)
        for chunk in iterate_chunks(host, self.groups, prompts, self._device, budget_bytes, progress.advance):
            for group, moments in chunk.items():
                for strength in strengths:
                    self._solved[strength].update(self._solve(group, moments, strength))

    def _check_all_ran(self) -> None:
        ran = {name for group in self.groups for name in group.members}
        if idle := sorted(set(self.sites) - ran):
            raise HostError(
                f"{len(idle)} of {len(self.sites)} adapted modules never run on a text prompt: {some(idle, 2)}",
                "The prompts source cannot judge them; use --unaligned.",
            )

    def repaired(self, strength: float) -> dict[str, Factors]:
        """The closest update at λ, by module name; A in float32, B as stored."""
        if strength not in self._solved:
            self._solved[strength] = {
                name: factors
                for group, moments in self._moments.items()
                for name, factors in self._solve(group, moments, strength).items()
            }
        return self._solved[strength]

    def _solve(self, group: InputGroup, moments: Moments, strength: float) -> dict[str, Factors]:
        """One factorisation for the stacked A's of all members."""
        members = [self.sites[name] for name in group.members]
        stacked = torch.cat([site.lora_a.to(self._device, torch.float64) for site in members])
        solve = {Form.MOMENT: by_moments, Form.TOKENS: by_tokens, Form.DIAGONAL: by_diagonal}[moments.form]
        solved = solve(stacked, moments.harmful, moments.benign, self.protect, strength).float().cpu()
        pieces = torch.split(solved, [site.rank for site in members])
        return {site.name: replace(Factors.of(site), lora_a=piece) for site, piece in zip(members, pieces, strict=True)}
