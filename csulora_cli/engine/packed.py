"""Quantised weights: whether all that they are made of is there, and what the kernels of bitsandbytes ask of them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from csulora_cli.checkpoint import Checkpoint, StoredTensor
from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.model_kind import fp8_block, is_plain
from csulora_cli.text import printable, some

_ROWS_AT_A_TIME = 32  # which the kernels for AVX-512 in bfloat16 pack
# Dtypes of weights that mean nothing without what stands beside them, as safetensors names them.
_CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})
_WEIGHT = ".weight"
_BESIDE = (".SCB", ".scale")  # endings of scales that are not named after the weight: of bitsandbytes and of some FP8
# Names of what weights are decoded with; inputs have scales as well, which nothing here needs.
_DECODES = re.compile(r"\.weight_(scale|zero_point)|(?<!input)(?<!activation)_(scale_inv|scales)$|absmax$|\.SCB$")
_FULL_HINT = "Give the full-precision model that it was made from."


def check_stored(location: Location, role: str) -> None:
    """Refuse, before it is loaded, a quantised model whose weights transformers would decode wrongly without a word.

    It loads a weight without its scale as if nothing were missing (5.23). One quantization gives all of its weights the
    same companions, so that one weight without them stands out; none at all is wrong, too. And it takes a scale of FP8
    to be of rows / scales rows, which are other blocks than were rounded where these do not divide the rows.

    Args:
        location: of the model; one that is not quantised, or a GGUF file, is not looked at.
        role: what the model is called in errors.

    Raises:
        HostError: companions are missing, or blocks do not divide a weight.
    """
    if location.gguf is not None or is_plain(location):
        return
    with Checkpoint(location.folder, role) as checkpoint:
        tensors = dict(checkpoint.tensors)
    model = f"the {role} {printable(location.given)}"
    companions = _companions(tensors)
    usual: dict[str, set[str]] = defaultdict(set)  # by the weight's dtype
    for name, own in companions.items():
        usual[tensors[name].dtype] |= own
    missing = [
        f"{name.removesuffix(_WEIGHT)}{ending}"
        for name, own in companions.items()
        for ending in sorted((usual[tensors[name].dtype] or {".weight_scale"}) - own)
    ]
    if missing:
        raise HostError(
            f"{model} lacks what its quantised weights are decoded with: {some(missing, 2)}",
            "Download it again, or give the full-precision model that it was made from.",
        )
    if (block := fp8_block(location)) is not None:
        for name in companions:
            scale = tensors.get(f"{name}_scale_inv")
            if scale is not None and _has_cut_blocks(tensors[name].shape, scale.shape, block):
                raise HostError(
                    f"{model} has blocks of {block[0]} by {block[1]} that do not divide '{printable(name)}', "
                    f"{' by '.join(map(str, tensors[name].shape))}: transformers would decode it wrongly",
                    _FULL_HINT,
                )


def _companions(tensors: Mapping[str, StoredTensor]) -> dict[str, set[str]]:
    """What stands beside each quantised weight, by the endings that follow the module's name."""
    companions: dict[str, set[str]] = {
        name: set() for name, tensor in tensors.items() if name.endswith(_WEIGHT) and tensor.dtype in _CODES
    }
    for name in tensors:
        module, dot, last = name.rpartition(".")
        if dot + last not in _BESIDE:
            module = name.partition(_WEIGHT)[0]
        ending = name.removeprefix(module)
        if ending != _WEIGHT and module + _WEIGHT in companions:
            companions[module + _WEIGHT].add(ending)
    return companions


def _has_cut_blocks(weight: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> bool:
    sizes = zip(weight, scales, block, strict=False)
    return len(weight) == len(scales) == 2 and any(count > 1 and size != count * of for size, count, of in sizes)


def check_decoded(model: nn.Module, unread: Iterable[str], location: Location, role: str) -> None:
    """Refuse a loaded model of which a quantised weight has not become numbers, nor what its layer runs on.

    Args:
        model: loaded.
        unread: names of the stored tensors that transformers has left out.
        location: of the model.
        role: what the model is called in errors.

    Raises:
        HostError: there is such a weight.
    """
    name = f"the {role} {printable(location.given)}"
    is_quantised = location.gguf is None and not is_plain(location)
    if is_quantised and (lost := sorted(key for key in unread if _DECODES.search(key))):
        raise HostError(f"transformers does not read what {name} decodes its weights with: {some(lost, 2)}", _FULL_HINT)
    raw = [f"{key}.weight" for key, module in model.named_modules() if _runs_without_scales(module)]
    raw += [
        key for key, weight in model.named_parameters() if weight.is_floating_point() and weight.dtype.itemsize == 1
    ]
    if raw:
        raise HostError(f"{name} has quantised weights that transformers does not decode: {some(raw, 2)}", _FULL_HINT)


def _runs_without_scales(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes whose weight is not one of its own, with its scales."""
    if not isinstance(module, nn.Linear) or "bitsandbytes" not in type(module).__module__:
        return False
    return all(getattr(module.weight, state, None) is None for state in ("quant_state", "SCB"))


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
