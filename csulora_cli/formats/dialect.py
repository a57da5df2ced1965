"""Dialects: the formats of adapter folders that are read, and repaired in the format in which they come."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from csulora_cli.formats import config as peft_config
from csulora_cli.formats import mlx
from csulora_cli.formats.carried import Carried, find_carried
from csulora_cli.formats.conversions import Content, convert, respelled
from csulora_cli.formats.structure import Structure
from csulora_cli.formats.targets import Target, find_targets
from csulora_cli.formats.ties import without_ties


@dataclass(frozen=True)
class Dialect:
    """One format.

    Attributes:
        name: for people; also the name of the library that loads it.
        weights_name: the file that holds the tensors.
        base_field: the field of the config that names the base model.
        check: checks the fields of a config.
        convert: rewrites what has no closest update of its own form; needs no host.
        respell: puts the names of modules on those of a host.
        untie: gives each end of a shared weight an update of its own.
        find_targets: the low-rank updates.
        find_carried: what else there is.
        uniform: the config of one rank for all modules with the scale in the factors.
    """

    name: str
    weights_name: str
    base_field: str
    check: Callable[[Mapping[str, Any]], None]
    convert: Callable[[Content], Content]
    respell: Callable[[Content, Structure], Content]
    untie: Callable[[Content, Structure], Content]
    find_targets: Callable[[Mapping[str, Any], Mapping[str, Tensor], Structure | None], tuple[Target, ...]]
    find_carried: Callable[[Mapping[str, Any], Mapping[str, Tensor], Structure], tuple[Carried, ...]]
    uniform: Callable[[Mapping[str, Any], int], dict[str, Any]]


PEFT = Dialect(
    "peft",
    "adapter_model.safetensors",
    "base_model_name_or_path",
    peft_config.check_fields,
    convert,
    respelled,
    without_ties,
    find_targets,
    find_carried,
    peft_config.uniform,
)
MLX = Dialect(
    "mlx",
    mlx.WEIGHTS_NAME,
    "model",
    mlx.check_fields,
    lambda content: content,
    lambda content, _structure: content,
    lambda content, _structure: content,
    mlx.find_targets,
    lambda _config, _tensors, _structure: (),
    mlx.uniform,
)


def dialect_of(config: Mapping[str, Any]) -> Dialect:
    """The dialect of an adapter, from its config."""
    return MLX if mlx.is_mlx(config) else PEFT
