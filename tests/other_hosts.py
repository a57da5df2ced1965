"""Hosts that are not plain safetensors, and the host on which PEFT says what is right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf_host import dequantised, write_gguf_host
from quantised_host import BITSANDBYTES, WRITTEN, reference, write_quantised_host

from csulora_cli.locate import Location


@dataclass(frozen=True)
class OtherHost:
    """A tiny host.

    Attributes:
        location: what csulora loads.
        reference: the folder of the host that PEFT is run on.
    """

    location: Location
    reference: Path


def _gguf(weights: str, folder: Path) -> OtherHost:
    (folder / "file").mkdir()
    file = write_gguf_host(folder / "file" / f"tiny-{weights}.gguf", weights)
    return OtherHost(Location(str(file), file.parent, gguf=file.name), dequantised(file, folder / "dequantised"))


def _quantised(name: str, folder: Path) -> OtherHost:
    host = write_quantised_host(name, folder)
    return OtherHost(Location(str(host), host), reference(host))


# Each writes its host below an empty folder.
OTHER_HOSTS: dict[str, Callable[[Path], OtherHost]] = {
    f"GGUF, {weights}": partial(_gguf, weights) for weights in ("F32", "F16", "Q8_0", "Q4_0")
} | {name: partial(_quantised, name) for name in (*BITSANDBYTES, *WRITTEN)}
