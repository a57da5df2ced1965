"""What transformers is given to load a model from: a folder of safetensors, or a GGUF file and nothing beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.text import printable


@dataclass(frozen=True)
class Pretrained:
    """Arguments of transformers' `from_pretrained`.

    Attributes:
        name: the folder.
        options: for config, tokenizer and model.
        model_options: for the model beside those.
    """

    name: str
    options: Mapping[str, Any]
    model_options: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def pretrained(location: Location, trust_remote_code: bool) -> Iterator[Pretrained]:
    """How transformers loads a model, as long as this is open.

    A GGUF file holds config, tokenizer and weights. transformers would prefer a tokenizer that lies beside it, and a
    file of its name in the working directory; neither need be the same model's. So it is given an empty folder, and the
    file by its whole path. Weights are dequantised, also those that it could run packed.

    Args:
        location: of the model.
        trust_remote_code: let its own code run.
    """
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if location.gguf is None:
        yield Pretrained(str(location.folder), options)
        return
    import transformers

    gguf_options = {**options, "gguf_file": str((location.folder / location.gguf).absolute())}
    has_packed = hasattr(transformers, "GgufConfig")  # since 5.23; before that every weight is dequantised
    dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_packed else {}
    with TemporaryDirectory() as empty, redirect_stderr(StringIO()):  # a bar of its own, which nothing turns off
        yield Pretrained(empty, gguf_options, dense)


def check_gguf_architecture(location: Location, config: Any, role: str) -> None:
    """Refuse an encoder-decoder model in a GGUF file, which only its config tells.

    Args:
        location: of the model.
        config: transformers' own, as read from it.
        role: what to call it in messages.

    Raises:
        HostError: it is one.
    """
    if location.gguf is not None and getattr(config, "is_encoder_decoder", False):
        raise HostError(
            f"the {role} {printable(location.given)} is an encoder-decoder model in a GGUF file",
            "Give the model as safetensors.",
        )
