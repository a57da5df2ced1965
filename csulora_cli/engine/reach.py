"""Which adapted modules text prompts run: a vision tower's never do, so that nothing measured on text judges them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from csulora_cli.engine.attach import submodule
from csulora_cli.engine.host import Host
from csulora_cli.formats.site import Site
from csulora_cli.text import some

# A router may send no token of a single prompt to some expert that is a module of its own.
_PROBES = 16


@dataclass(frozen=True)
class Reach:
    """What of an adapter text prompts judge.

    Attributes:
        modules: how many adapted modules there are.
        prompts: how many were tried.
        unreached: names of those that text prompts do not run, less those whose update is zero.
        is_none: no update that is not zero is reached, and there is one.
    """

    modules: int
    prompts: int
    unreached: list[str]
    is_none: bool

    def __str__(self) -> str:
        """How many are not reached, and which, as the beginning of a message."""
        return f"{len(self.unreached)} of {self.modules} adapted modules run on none of {self.prompts} text prompts"

    @property
    def names(self) -> str:
        """The first few of those that are not reached."""
        return some(self.unreached, 2)


def reach_of(host: Host, sites: Sequence[Site], prompts: Sequence[str]) -> Reach:
    """Run the host, without the adapter, on the first prompts and see which adapted modules run.

    Args:
        host: the host.
        sites: of an adapter that is bound to it.
        prompts: text.
    """
    acting = [site for site in sites if not site.is_zero]
    owners = {site.name: submodule(host.model, site.place.module) for site in acting}
    waiting = set(owners.values())

    def note(module: nn.Module, *_: Any) -> None:
        waiting.discard(module)

    tried = prompts[:_PROBES]
    with ExitStack() as stack:
        for module in set(waiting):
            stack.callback(module.register_forward_hook(note).remove)
        for text in tried:
            if waiting:  # one prompt is enough as a rule
                for batch in host.batches([host.encode(text)]):
                    host.run(batch)
    unreached = [site.name for site in acting if owners[site.name] in waiting]
    return Reach(len(sites), len(tried), unreached, bool(acting) and len(unreached) == len(acting))
