"""Weights packed in 4 bits by bitsandbytes: what its kernels on the CPU ask of their sizes."""

import torch
from torch import nn

from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.text import printable

_ROWS_AT_A_TIME = 32  # which the kernels for AVX-512 in bfloat16 pack


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
