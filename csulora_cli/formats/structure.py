"""What modules and parameters a host has: names, kinds and shapes, without any weight."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from csulora_cli.errors import HostError
from csulora_cli.formats.replication import Repeats, Replication, grow
from csulora_cli.formats.stored import StoredForm
from csulora_cli.locate import Location
from csulora_cli.pretrained import check_gguf_architecture, pretrained
from csulora_cli.text import printable


@dataclass(frozen=True)
class HostModule:
    """One module.

    Attributes:
        kind: the name of its class, for people; Conv1D is told apart by it.
        layer: which of torch's layers it is ("linear", "embedding", "convolution"), or None.
        shapes: its own parameters in the order of their definition, with their shapes.
        is_transposed: the module says that it stores its experts as (experts, in, out).
        has_gaps: a convolution of which PEFT runs another one beside it, without the gaps in its kernel, so
            that the outputs do not fit together.
        groups: of a convolution; 1 for any other layer.
    """

    kind: str
    layer: str | None
    shapes: Mapping[str, tuple[int, ...]]
    is_transposed: bool
    has_gaps: bool
    groups: int

    @property
    def is_conv1d(self) -> bool:
        """A linear layer that stores its weight as (in, out)."""
        return self.kind == "Conv1D"


@dataclass(frozen=True)
class Structure:
    """The modules of a host; buffers and weights are not kept.

    Attributes:
        modules: by name, in the order of the host.
        ties: the other names of a weight that several modules share, by each of its names.
        repeats: which of its layers are repeated, or None.
        stored: how its parameters are stored; None if only the model in memory is known.
    """

    modules: Mapping[str, HostModule]
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeats: Repeats | None = None
    stored: StoredForm | None = None

    def stored_names(self, weight: str) -> tuple[str, ...]:
        """The names under one of which a checkpoint has a parameter."""
        names = (weight, *self.ties.get(weight, ()))
        return tuple(dict.fromkeys(map(self.repeats.stored, names))) if self.repeats else names

    def shape(self, weight: str) -> tuple[int, ...] | None:
        """The shape of a parameter by its whole name; None if there is none."""
        module, _, parameter = weight.rpartition(".")
        found = self.modules.get(module)
        return found.shapes.get(parameter) if found else None


def structure_of(model: nn.Module, repeats: Repeats | None = None) -> Structure:
    """The structure of a model in memory or on the meta device, with what `grow` said of it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    ties = {name: tuple(other for other in own if other != name) for own in names.values() for name in own}
    return Structure(
        {name: _describe(module) for name, module in model.named_modules()},
        {name: others for name, others in ties.items() if others},
        repeats,
    )


def _describe(module: nn.Module) -> HostModule:
    layer = None
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        layer = "linear"
    elif isinstance(module, nn.Embedding):
        layer = "embedding"
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer = "convolution"
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear):
        shapes["weight"] = (module.out_features, module.in_features)  # also where the weight is packed
    return HostModule(
        type(module).__name__,
        layer,
        shapes,
        bool(getattr(module, "is_transposed", False)),
        layer == "convolution" and _has_gaps(module),
        int(getattr(module, "groups", 1)) if layer == "convolution" else 1,
    )


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in another form than numbers (out, in), as quantised ones do."""
    if not isinstance(module, nn.Linear):
        return False
    is_whole = module.weight.shape == (module.out_features, module.in_features)
    return not is_whole or not module.weight.is_floating_point()


def _has_gaps(module: Any) -> bool:
    return any(size > 1 and step > 1 for size, step in zip(module.kernel_size, module.dilation, strict=True))


def read_structure(
    location: Location,
    trust_remote_code: bool,
    replication: Replication | None = None,
    modules: Collection[str] = (),
) -> Structure:
    """The structure of a host, built from its config on the meta device: no weights, no memory.

    Args:
        location: of the host.
        trust_remote_code: let its own code run.
        replication: which of its layers are repeated.
        modules: see `model_class`.

    Raises:
        HostError: transformers does not know such a model, or its layers cannot be repeated so.
    """
    import transformers

    try:
        with pretrained(location, trust_remote_code) as source:
            config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
        check_gguf_architecture(location, config, "host")
        model = _outline(model_class(config, trust_remote_code, modules), config, trust_remote_code)
    except HostError:
        raise
    except Exception as problem:  # transformers and the host's own code raise anything
        raise HostError(
            f"cannot tell what modules {printable(location.given)} has: {printable(problem)}",
            "Check that transformers can load it.",
        ) from None
    stored = StoredForm(model)  # before layers are repeated, which no file knows of
    return replace(structure_of(model, grow(model, replication)), stored=stored)


def _outline(choice: Any, config: Any, trust_remote_code: bool) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return choice.from_config(config, trust_remote_code=trust_remote_code)


def model_class(config: Any, trust_remote_code: bool, modules: Collection[str] = ()) -> Any:
    """The automatic class of transformers by which a model is loaded: it generates text and knows this kind of config.

    Several can know it, where a model can be loaded with its vision tower or without, and give its modules other names.
    An adapter fits the class that it was trained on: the one is taken that has most of its modules, else the one that
    the checkpoint was saved from.

    Args:
        config: transformers' own.
        trust_remote_code: let the model's own code run.
        modules: names of modules that an adapter has.

    Raises:
        ValueError: it is of an encoder-decoder model that transformers does not run as a language model.
    """
    import transformers

    if config.is_encoder_decoder:  # several of these are known as decoders alone, too
        choice = transformers.AutoModelForSeq2SeqLM
        if type(config) not in choice._model_mapping and not hasattr(config, "auto_map"):
            raise ValueError(f"transformers has no encoder-decoder language model of the type {config.model_type}")
        return choice
    choices = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,  # also knows some that have no encoder
    )
    known = {choice: choice._model_mapping[type(config)] for choice in choices if type(config) in choice._model_mapping}
    if not known:
        return transformers.AutoModelForCausalLM  # also for what brings its own code; it says what is missing
    saved = [choice for choice, own in known.items() if own.__name__ in (config.architectures or ())]
    ordered = [*saved, *known]
    if len(set(known.values())) == 1 or not modules:
        return ordered[0]

    def fitting(choice: Any) -> int:
        names = {name for name, _ in _outline(choice, config, trust_remote_code).named_modules()}
        return len(names.intersection(modules))

    return max(ordered, key=fitting)  # the first of equals
