"""Loading a model through transformers: what it says, what it leaves out and what it gets wrong, as errors of ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

import torch

from csulora_cli.engine.memory import is_out_of_memory
from csulora_cli.engine.packed import check_blocks, check_decoded, check_stored
from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.pretrained import Pretrained
from csulora_cli.text import printable, some


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and notes out of our output."""
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)  # it tells of a cast at every product
    level = logging.get_verbosity()
    had_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


@contextmanager
def loading(location: Location, role: str, hint: str) -> Iterator[None]:
    """Load a model while this is open.

    Args:
        location: of the model.
        role: what the model is called in errors.
        hint: what to check where transformers cannot load it.

    Raises:
        HostError: it cannot.
    """
    try:
        with quiet_transformers():
            yield
    except HostError:
        raise
    except Exception as problem:  # transformers and the model's own code raise anything
        if is_out_of_memory(problem):
            raise
        reason = str(problem)
        if "trust_remote_code" in reason:
            hint = "It brings its own code: read it, then add --trust-remote-code."
        if "CONVERSION" in reason:  # points to a report that was not printed
            reason = "transformers cannot make the model's weights of those that are stored"
        raise HostError(f"cannot load the {role} {printable(location.given)}: {printable(reason)}", hint) from None


def load_weights(
    kind: Any, source: Pretrained, config: Any, dtype: str, device: torch.device, location: Location, role: str
) -> Any:
    """A model, whole and in evaluation mode, its weights dequantised wherever transformers can.

    Args:
        kind: its class in transformers.
        source: what to load it from.
        config: transformers' own.
        dtype: see `choose_dtype`.
        device: where to run it.
        location: of the model.
        role: what the model is called in errors.

    Raises:
        HostError: it lacks weights or what they are decoded with, or has weights that cannot run there.
    """
    check_stored(location, role)
    _dequantise(config)
    model, found = kind.from_pretrained(
        source.name, config=config, dtype=choose_dtype(dtype, getattr(config, "dtype", None), device),
        use_safetensors=True, output_loading_info=True, **source.options, **source.model_options,
    )  # fmt: skip
    _check_complete(found, location, role)
    check_decoded(model, found["unexpected_keys"], location, role)
    check_blocks(model, device, location, role)
    return model.to(device).eval()


def _dequantise(config: Any) -> None:
    """Let transformers dequantise the weights by every method that can, also where a kernel would run them.

    bitsandbytes pays no heed to it: its weights stay packed.
    """
    own = getattr(config, "quantization_config", None)
    if isinstance(own, dict):
        own["dequantize"] = True


def _check_complete(found: Mapping[str, Any], location: Location, role: str) -> None:
    """Refuse a model of which transformers has not found every weight: it makes up the others at random."""
    if missing := sorted(found["missing_keys"]):
        raise HostError(
            f"the {role} {printable(location.given)} lacks the weights {some(missing, 2)}",
            "Download it again, or give the model that these files belong to.",
        )


def choose_dtype(name: str, stored: Any, device: torch.device) -> torch.dtype:
    """The dtype to run in; `auto` takes the stored one, but float32 in the place of float16 on the CPU."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if not isinstance(stored, torch.dtype) or (stored is torch.float16 and device.type == "cpu"):
        return torch.float32
    return stored
