"""How transformers makes a model's parameters of the tensors of a checkpoint: other names, experts stored one by one.

The rules are those that transformers (5 and later) has registered for the model, applied as it applies them when it
loads one; no architecture is named here. Older versions have no such rules, and parameters are stored as they are.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from csulora_cli.errors import HostError
from csulora_cli.text import printable

# Gives a tensor of the checkpoint by its name, and one part of it along its first dimension if one is asked for.
Read = Callable[[str, int | None], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one parameter is made.

    Attributes:
        parameter: its name in the model.
        sources: the names of the tensors on disk, in the order in which transformers takes them, by what they are to
            the converter; one under its own name where it is only renamed.
        converter: what makes the parameter of them (transformers' WeightConverter), or None.
        target: the name that the converter is told, which is that of its first result.
        model: the model that the rules are of.
    """

    parameter: str
    sources: Mapping[str, tuple[str, ...]]
    converter: Any
    target: str
    model: Any

    @property
    def names(self) -> list[str]:
        """All tensors on disk that it takes."""
        return [name for names in self.sources.values() for name in names]

    @cached_property
    def _stacks_parts(self) -> bool:
        """Whether part i of the parameter is made of the i-th tensor of each source alone.

        So where the sources are stacked first, and what follows leaves the first dimension alone.
        """
        from transformers.core_model_loading import MergeModulelist

        first, *others = self.converter.operations
        is_stack = isinstance(first, MergeModulelist) and first.dim == 0
        return is_stack and all(getattr(op, "dim", 0) > 0 for op in others)

    def make(self, read: Read, part: int | None = None) -> Tensor:
        """The parameter, or one part of it along its first dimension.

        Raises:
            HostError: the tensors do not fit together.
        """
        if self.converter is None:
            return read(self.names[0], part)
        if part is not None and self._stacks_parts:
            return self._converted(read, lambda names: names[part : part + 1])[0]
        whole = self._converted(read, lambda names: names)
        return whole if part is None else whole[part]

    def _converted(self, read: Read, choose: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Tensor:
        converter = copy.deepcopy(self.converter)
        for source, names in self.sources.items():
            for name in choose(names):
                converter.add_tensor(self.target, name, source, read(name, None))
        try:
            made = converter.convert(self.target, model=self.model, config=self.model.config)[self.parameter]
        except Exception as problem:  # transformers' operations raise anything
            raise HostError(
                f"'{printable(self.parameter)}' cannot be made of the tensors that the model stores: "
                f"{printable(problem)}",
                "Download the model again.",
            ) from None
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


class StoredForm:
    """The rules of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.state_dict())  # as they are now: the layers may be repeated later

    def recipes(self, names: Iterable[str]) -> list[Recipe]:
        """How each parameter is made that is not stored as it is.

        Args:
            names: of all tensors of a checkpoint.
        """
        try:
            from transformers import PreTrainedModel
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
        except ImportError:
            return []
        if not isinstance(self._model, PreTrainedModel):
            return []
        rules = get_model_conversion_mapping(self._model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        prefix = self._model.base_model_prefix
        of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, self._parameters)
            if renamed not in self._parameters and name in self._parameters:
                renamed, pattern = rename_source_key(name, [], [], prefix, self._parameters)
            converter = of_pattern[pattern] if pattern is not None else None
            sources = collected.setdefault(renamed, (converter, {}))[1]
            sources.setdefault(pattern or name, []).append(name)
        return [
            Recipe(parameter, {key: tuple(own) for key, own in sources.items()}, converter, target, self._model)
            for target, (converter, sources) in collected.items()
            for parameter in _results(target, converter)
            if parameter in self._parameters and (converter is not None or [parameter] != sources.get(parameter))
        ]


def _results(target: str, converter: Any) -> list[str]:
    """The names of all that a converter makes; the first of them is the one that it is told."""
    if converter is None:
        return [target]
    first, *others = converter.target_patterns
    return [target, *(target.replace(first, other) for other in others)]
