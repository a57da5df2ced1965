"""Quantised weights: whether all that they are made of is there, and what the kernels of bitsandbytes ask of them."""

from collections import defaultdict

import torch
from torch import nn

from csulora_cli.checkpoint import Checkpoint
from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.model_kind import is_plain
from csulora_cli.text import printable, some

_ROWS_AT_A_TIME = 32  # which the kernels for AVX-512 in bfloat16 pack
# Dtypes of weights that mean nothing without what stands beside them, as safetensors names them.
_CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})
_WEIGHT = ".weight"


def check_companions(location: Location, role: str) -> None:
    """Refuse a quantised model that has lost some of the tensors that its weights are decoded with.

    transformers loads a weight without its scale as if nothing were missing (5.23). One quantization gives all of its
    weights the same companions, so that one weight without them stands out.

    Args:
        location: of the model; one that is not quantised, or a GGUF file, has no companions.
        role: what the model is called in errors.

    Raises:
        HostError: companions are missing.
    """
    if location.gguf is not None or is_plain(location):
        return
    with Checkpoint(location.folder, role) as checkpoint:
        dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    companions = {name: set[str]() for name, kind in dtypes.items() if name.endswith(_WEIGHT) and kind in _CODES}
    usual: dict[str, set[str]] = defaultdict(set)  # by the weight's dtype
    for name in dtypes:
        module, found, ending = name.partition(_WEIGHT)
        weight = module + found
        if ending and weight in companions:
            companions[weight].add(ending)
            usual[dtypes[weight]].add(ending)
    missing = [name + ending for name, own in companions.items() for ending in sorted(usual[dtypes[name]] - own)]
    if missing:
        raise HostError(
            f"the {role} {printable(location.given)} lacks what its quantised weights are decoded with: "
            f"{some(missing, 2)}",
            "Download it again, or give the full-precision model that it was made from.",
        )


def check_blocks(model: nn.Module, device: torch.device, location: Location, role: str) -> None:
    """Refuse 4-bit weights that bitsandbytes cannot run on the CPU, or runs wrongly.

    Each block of consecutive weights has a scale of its own. The kernels with AVX-512 let every row of a weight
    (out, in) begin with a new block. Where the block size does not divide `in`, that ends in an error, or gives other
    products without a word (bitsandbytes 0.50: where 16 divides `in`). Which of the kernels will run is not asked.

    Args:
        model: loaded.
        device: where it is to run; elsewhere than on the CPU every size is taken.
        location: of the model.
        role: what the model is called in errors.

    Raises:
        HostError: there is such a weight.
    """
    if device.type != "cpu":
        return
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        rows, width = state.shape
        wrong = ""
        if width % state.blocksize:
            wrong = f"blocks of {state.blocksize} weights do not divide its width of {width}"
        elif getattr(module, "support_avx512bf16_for_cpu", False) and rows % _ROWS_AT_A_TIME:
            wrong = f"its {rows} rows are no multiple of {_ROWS_AT_A_TIME}"
        if wrong:
            raise HostError(
                f"bitsandbytes cannot run '{printable(name)}' of the {role} {printable(location.given)} on the CPU: "
                f"{wrong}",
                "Give the full-precision model that it was made from, or run it on a GPU.",
            )
