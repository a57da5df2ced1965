"""Adapters that must be refused: how each is made, which error it gives, and what the message must name.

Every case starts from a good adapter on the tiny host, so that nothing but the one fault can be the reason.
"""

import json
import os
import pickle
import socket
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from csulora_cli.errors import AdapterError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"  # (32, 32) in the tiny host
KEY_A = f"base_model.model.{MODULE}.lora_A.weight"
KEY_B = f"base_model.model.{MODULE}.lora_B.weight"
GOOD_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
}  # fmt: skip


@dataclass(frozen=True)
class BadFile:
    """One bad adapter.

    Attributes:
        name: what is wrong with it.
        make: puts it into an empty folder.
        names: what the message must contain.
        error: the class of the error.
        is_bomb: whether it tries to take memory or time out of proportion to its size.
    """

    name: str
    make: Callable[[Path], object]
    names: tuple[str, ...]
    error: type[AdapterError] = AdapterError
    is_bomb: bool = False


class CannotMakeError(Exception):
    """This machine or user cannot make the case."""


def good_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The factors of one module."""
    generator = torch.Generator().manual_seed(0)
    shapes = {KEY_A: (2, 32), KEY_B: (32, 2)}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write(folder: Path, config: Any = None, weights: Mapping[str, Tensor] | bytes | None = None) -> None:
    """An adapter that is good but for what is given: config as entries, text or bytes; weights as tensors or bytes."""
    config = GOOD_CONFIG if config is None else config
    text = json.dumps(config) if isinstance(config, dict) else config
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    weights = good_tensors() if weights is None else weights
    (folder / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else save(dict(weights)))


# Ways to make them


def config(**entries: Any) -> Callable[[Path], None]:
    """Other config entries."""
    return lambda folder: write(folder, {**GOOD_CONFIG, **entries})


def raw_config(text: str | bytes) -> Callable[[Path], None]:
    """Other bytes in the place of the config."""
    return lambda folder: write(folder, text)


def json_config(field: str, text: str) -> Callable[[Path], None]:
    """A field whose value is spelled out, as `json.dumps` would not."""
    entries = json.dumps({**GOOD_CONFIG, field: "HERE"})
    return lambda folder: write(folder, entries.replace('"HERE"', text))


def raw_weights(data: bytes) -> Callable[[Path], None]:
    """Other bytes in the place of the weights."""
    return lambda folder: write(folder, weights=data)


def tensors(change: Callable[[dict[str, Tensor]], object], **entries: Any) -> Callable[[Path], None]:
    """Changed tensors."""

    def make(folder: Path) -> None:
        changed = good_tensors()
        change(changed)
        write(folder, {**GOOD_CONFIG, **entries}, changed)

    return make


def factor(key: str, value: Tensor) -> Callable[[Path], None]:
    """One tensor more, or another one."""
    return tensors(lambda all_of_them: all_of_them.update({key: value}))


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def header(**entries: Any) -> Callable[[Path], None]:
    """A file of the good size in which the header's entry of lora_A is another one."""
    data = save(good_tensors())
    (length,) = struct.unpack("<Q", data[:8])
    parsed = json.loads(data[8 : 8 + length])
    parsed[KEY_A] = {**parsed[KEY_A], **entries}
    return raw_weights(with_header(parsed, data[8 + length :]))


def stored_as(dtype: str, bytes_each: float) -> bytes:
    """A file whose lora_A has any dtype of the format, also one that torch has not."""
    size = int(64 * bytes_each)
    good = good_tensors()[KEY_B].numpy().tobytes()
    entries = {
        KEY_A: {"dtype": dtype, "shape": [2, 32], "data_offsets": [0, size]},
        KEY_B: {"dtype": "F32", "shape": [32, 2], "data_offsets": [size, size + len(good)]},
    }
    return with_header(entries, b"\0" * size + good)


def instead(name: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of one of the two files."""

    def make(folder: Path) -> None:
        write(folder)
        (folder / name).rename(folder / "was-it")
        put(folder / name)

    return make


def without(name: str, *others: tuple[str, bytes]) -> Callable[[Path], None]:
    """One of the two files is missing; others are there."""

    def make(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()
        for other, data in others:
            (folder / other).write_bytes(data)

    return make


def put_socket(path: Path) -> None:
    """A Unix socket."""
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # whatever the length of the folder's path
        except OSError as problem:
            raise CannotMakeError("no sockets here") from problem
        finally:
            os.close(here)


def put_device(path: Path) -> None:
    """A device that never ends."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError as problem:
        raise CannotMakeError("only root makes devices") from problem


def put_unreadable(path: Path) -> None:
    """A file that may not be read."""
    path.write_bytes((path.parent / "was-it").read_bytes())
    path.chmod(0)
    if os.access(path, os.R_OK):
        raise CannotMakeError("root may read everything")


def put_loop(path: Path) -> None:
    """Two links that point to each other."""
    path.with_name("loop").symlink_to(path.name)
    path.symlink_to("loop")


def put_link_outside(path: Path) -> None:
    """A link to a good file in another folder."""
    outside = path.parent.parent / f"outside-{path.name}"
    (path.parent / "was-it").rename(outside)
    path.symlink_to(outside)


def put_link_to_other_cache(path: Path) -> None:
    """A link that looks like the Hub cache's, but out of a folder that is no snapshot."""
    blobs = path.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (path.parent / "was-it").rename(blobs / "0123")
    path.symlink_to("../blobs/0123")


class Canary:
    """Creates a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


PICKLED = pickle.dumps(Canary())


def put_zip(path: Path) -> None:
    """What torch.save writes, with a canary in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLED)


def _nested(depth: int, opening: str = '{"a":', closing: str = "}") -> str:
    return opening * depth + "1" + closing * depth


def _many_empty_tensors(count: int) -> bytes:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return with_header(b"{" + b",".join(entry % index for index in range(count)) + b"}")


def _put_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(with_header({KEY_A: {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, 256]}}))
        file.truncate(2**40)


def _scaled(key_factor: dict[str, float], dtype: torch.dtype) -> Callable[[Path], None]:
    values = {key: torch.ones(tensor.shape, dtype=dtype) for key, tensor in good_tensors().items()}
    for key, value in key_factor.items():
        values[key] *= value
    return lambda folder: write(folder, weights=values)


def _one_value(key: str, value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    changed = good_tensors(dtype)
    changed[key][1, 1] = value
    return lambda folder: write(folder, weights=changed)


def _twice(first: str, second: str) -> bytes:
    """One name for two tensors that cover the same bytes."""
    return with_header(f'{{"{KEY_A}":{first},"{KEY_A}":{second}}}'.encode(), b"\0" * 256)


def _full_model(folder: Path) -> None:
    weights = {f"model.layers.{index}.self_attn.q_proj.weight": torch.ones(32, 32) for index in range(4)}
    write(folder, weights=weights)


_SAVED = save(good_tensors())
_HOSTILE = "evil\n::error::\x1b[31m\u202e"
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Containers: what is in the place of the safetensors file is none, or a damaged one

_CONTAINERS = [
    *(
        BadFile(f"cut off after {keep} bytes", raw_weights(_SAVED[:keep]), (WEIGHTS, "byte"))
        for keep in (1, 7, 8, 9, 40, len(_SAVED) // 2, len(_SAVED) - 1)
    ),
    BadFile("empty file", raw_weights(b""), (WEIGHTS, "it has 0 bytes")),
    BadFile("one byte too many", raw_weights(_SAVED + b"\0"), (WEIGHTS, "end at byte")),
    BadFile("a second file behind the first", raw_weights(_SAVED * 2), (WEIGHTS, "end at byte")),
    BadFile("empty header", raw_weights(struct.pack("<Q", 0)), (WEIGHTS, "header")),
    BadFile("header of 2^62 bytes", raw_weights(struct.pack("<Q", 2**62) + b"{}"), (WEIGHTS, "header"), is_bomb=True),
    BadFile("header of 2^64-1 bytes", raw_weights(b"\xff" * 8 + b"{}"), (WEIGHTS, "header"), is_bomb=True),
    BadFile(
        "header that claims 100 MB", raw_weights(struct.pack("<Q", 10**8) + b"{}"), (WEIGHTS, "header"), is_bomb=True
    ),
    BadFile("header that has 40 MB", raw_weights(with_header(b"{" + b" " * 40_000_000 + b"}")),
            (WEIGHTS, "its header has"), is_bomb=True),
    BadFile("20,000 empty tensors", raw_weights(_many_empty_tensors(20_000)), (WEIGHTS, "'0'", "shape"),
            is_bomb=True),
    BadFile("header nested 100,000 deep", raw_weights(with_header(_nested(10**5).encode())),
            (WEIGHTS, "nested too deeply"), is_bomb=True),
    BadFile("file of 1 TiB with nothing in it", instead(WEIGHTS, _put_sparse), (WEIGHTS, "end at byte"), is_bomb=True),
    BadFile("header is a list", raw_weights(with_header([1])), (WEIGHTS, "not an object")),
    BadFile("header is cut JSON", raw_weights(with_header(b'{"a')), (WEIGHTS, "header")),
    BadFile("header with BOM", raw_weights(with_header(b"\xef\xbb\xbf" + b"{}")), (WEIGHTS, "header")),
    BadFile("header is no UTF-8", raw_weights(with_header(b'{"\xff":1}')), (WEIGHTS, "header", "utf-8")),
    BadFile("header with NaN", raw_weights(with_header(b'{"a":NaN}')), (WEIGHTS, "NaN is not JSON")),
    BadFile("header with lone surrogate", raw_weights(with_header(b'{"\\ud800":{"dtype":"F32","shape":[1],'
            b'"data_offsets":[0,4]}}', b"\0" * 4)), (WEIGHTS,)),
    BadFile("one name twice, same bytes as another dtype",
            raw_weights(_twice('{"dtype":"F32","shape":[2,32],"data_offsets":[0,256]}',
                               '{"dtype":"F16","shape":[4,32],"data_offsets":[0,256]}')),
            (WEIGHTS, KEY_A, "twice")),
    BadFile("one name twice, the same entry",
            raw_weights(_twice(*['{"dtype":"F32","shape":[2,32],"data_offsets":[0,256]}'] * 2)),
            (WEIGHTS, KEY_A, "twice")),
    BadFile("one field of an entry twice",
            raw_weights(with_header(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}',
                                    b"\0" * 4)),
            (WEIGHTS, "'dtype'", "twice")),
    BadFile("metadata that is no text", raw_weights(with_header({"__metadata__": {"a": 1}})), (WEIGHTS, "string")),
    BadFile("metadata that is a tensor",
            raw_weights(with_header({"__metadata__": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
                                    b"\0" * 4)), (WEIGHTS,)),
    BadFile("negative offset", header(data_offsets=[-256, 0]), (WEIGHTS,)),
    BadFile("offsets backwards", header(data_offsets=[256, 0]), (WEIGHTS,)),
    BadFile("offset of 2^64", header(data_offsets=[0, 2**64]), (WEIGHTS, "end at byte"), is_bomb=True),
    BadFile("offsets beyond the file", header(data_offsets=[0, 2**40]), (WEIGHTS, "end at byte"), is_bomb=True),
    BadFile("offsets that overlap", header(data_offsets=[100, 356]), (WEIGHTS, "offset")),
    BadFile("a hole between tensors", header(data_offsets=[0, 252]), (WEIGHTS,)),
    BadFile("three offsets", header(data_offsets=[0, 100, 256]), (WEIGHTS, KEY_A, "data_offsets")),
    BadFile("offsets that are text", header(data_offsets=["0", "256"]), (WEIGHTS, KEY_A, "data_offsets")),
    BadFile("offsets that are fractions", header(data_offsets=[0, 256.5]), (WEIGHTS, KEY_A, "data_offsets")),
    BadFile("no offsets", header(data_offsets=None), (WEIGHTS, KEY_A, "data_offsets")),
    BadFile("shape whose size overflows", header(shape=[2**62, 2**62]), (WEIGHTS, "overflow"), is_bomb=True),
    BadFile("shape larger than its bytes", header(shape=[2, 2**30]), (WEIGHTS,), is_bomb=True),
    BadFile("shape that is negative", header(shape=[-2, 32]), (WEIGHTS,)),
    BadFile("shape that is no list", header(shape=64), (WEIGHTS,)),
    BadFile("shape of 10,000 ones", header(shape=[1] * 10_000 + [64]), (WEIGHTS, MODULE, "shape")),
    BadFile("dtype unknown to the format", header(dtype="F3"), (WEIGHTS, "F3")),
    BadFile("dtype that is a number", header(dtype=32), (WEIGHTS,)),
    BadFile("web page saved as safetensors", raw_weights(b"<!doctype html><title>404</title>" * 20),
            (WEIGHTS, "web page")),
    BadFile("Git LFS pointer as weights",
            raw_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 132\n"),
            (WEIGHTS, "Git LFS pointer")),
    BadFile("pickle saved as safetensors", raw_weights(PICKLED), (WEIGHTS, "pickle")),
    BadFile("torch.save saved as safetensors", instead(WEIGHTS, put_zip), (WEIGHTS, "zip archive")),
    BadFile("GGUF saved as safetensors", raw_weights(b"GGUF" + b"\3\0\0\0" + b"\0" * 40), (WEIGHTS, "GGUF")),
    BadFile("JSON saved as safetensors", raw_weights(json.dumps(GOOD_CONFIG).encode()), (WEIGHTS, "header")),
    BadFile("random bytes", raw_weights(bytes((7 * index + index**2) % 251 for index in range(4096))), (WEIGHTS,)),
]  # fmt: skip

# Tensors: what the file holds is no LoRA

_TENSORS = [
    BadFile("no tensors at all", raw_weights(save({})), (WEIGHTS, "holds no tensors")),
    *(
        BadFile(f"lora_{letter} with shape {shape}", factor(key, torch.ones(shape)),
                (WEIGHTS, f"lora_{letter}", MODULE))
        for letter, key in (("A", KEY_A), ("B", KEY_B))
        for shape in ((), (64,), (0, 32), (2, 0), (0,), (1, 1, 1, 1, 1, 1, 64))
    ),
    *(
        BadFile(f"lora_A stored as {name}", factor(KEY_A, torch.ones(2, 32).to(getattr(torch, name))),
                (WEIGHTS, "lora_A", MODULE, name), UnsupportedError)
        for name in ("int8", "uint8", "int16", "int32", "int64", "uint16", "bool", "complex64")
    ),
    *(
        BadFile(f"lora_A stored as {name}, which torch has not", raw_weights(stored_as(name, size)),
                (WEIGHTS, KEY_A, name))
        for name, size in (("F4", 0.5), ("F6_E2M3", 0.75), ("F6_E3M2", 0.75))
    ),
    BadFile("lora_A without lora_B", tensors(lambda t: t.pop(KEY_B)), (WEIGHTS, MODULE, "no lora_B")),
    BadFile("lora_B without lora_A", tensors(lambda t: t.pop(KEY_A)), (WEIGHTS, MODULE, "no lora_A")),
    BadFile("ranks of A and B differ", factor(KEY_B, torch.ones(32, 3)), (CONFIG, MODULE, "(32, 3)")),
    BadFile("rank differs from the config", config(r=4), (CONFIG, MODULE, "rank 4")),
    BadFile("rank differs from rank_pattern", config(rank_pattern={"q_proj": 3}), (CONFIG, MODULE, "rank 3")),
    BadFile("factors swapped", tensors(lambda t: t.update({KEY_A: t[KEY_B], KEY_B: t[KEY_A]})), (CONFIG, MODULE)),
    *(
        BadFile(f"{value} in lora_{letter}, {name}", _one_value(key, value, dtype),
                (WEIGHTS, f"lora_{letter}", MODULE, "NaN or Inf"))
        for letter, key in (("A", KEY_A), ("B", KEY_B))
        for value in (float("nan"), float("inf"))
        for name, dtype in _FLOATS.items()
    ),
    *(
        BadFile(f"product overflows {name}", _scaled(dict.fromkeys((KEY_A, KEY_B), value), _FLOATS[name]),
                (WEIGHTS, MODULE, "overflows"))
        for name, value in (("fp32", 1e30), ("fp16", 3e4), ("bf16", 1e30))
    ),
    BadFile("KaSA diagonal", factor(f"base_model.model.{MODULE}.lora_diag", torch.ones(2)),
            (WEIGHTS, "lora_diag"), UnsupportedError),
    BadFile("LoRA of an unknown kind", factor(f"base_model.model.{MODULE}.lora_C.weight", torch.ones(2, 2)),
            (WEIGHTS, "lora_C"), UnsupportedError),
    BadFile("full model saved as adapter", _full_model, (WEIGHTS, "q_proj.weight"), UnsupportedError),
    BadFile("tensor without a name", factor("", torch.ones(2, 2)), (WEIGHTS,), UnsupportedError),
    BadFile("tensor with a line break, an escape and a bidi mark in its name",
            factor(f"base_model.model.{_HOSTILE}.lora_A.weight", torch.ones(2, 32)),
            (WEIGHTS, "evil\\n::error::\\x1b[31m\\u202e")),
    BadFile("name that ends in a line break", factor(KEY_A + "\n", torch.ones(2, 32)), (WEIGHTS,), UnsupportedError),
]  # fmt: skip

# Configs

_ABSURD_RANKS = {"bool": True, "float": 2.0, "text": "2", "0": 0, "negative": -2, "10^9": 10**9, "null": None,
                 "list": [2], "10^4000": 10**4000}  # fmt: skip
_ABSURD_ALPHAS = {"bool": True, "text": "4", "1e308": 1e308, "-1e12": -1e12, "null": None, "list": [4], "object": {}}
_WRONG_TYPES = {
    "rank_pattern": [1], "alpha_pattern": "q_proj", "use_dora": "yes", "bias": 1, "init_lora_weights": {"a": 1},
    "use_rslora": "yes", "fan_in_fan_out": "no", "target_modules": 3, "exclude_modules": 3,
}  # fmt: skip
_REPEATS = "(?:(?:(?:a{1000}){1000}){1000}){1000}"

_CONFIGS = [
    BadFile("empty config", raw_config(""), (CONFIG, "not valid JSON")),
    BadFile("config is cut off", raw_config(json.dumps(GOOD_CONFIG)[:-1]), (CONFIG, "not valid JSON")),
    BadFile("config is a web page", raw_config("<html>404</html>"), (CONFIG, "not valid JSON")),
    BadFile("config is a Git LFS pointer", raw_config("version https://git-lfs.github.com/spec/v1\n"), (CONFIG,)),
    BadFile("config is a list", raw_config("[]"), (CONFIG, "list")),
    BadFile("config is null", raw_config("null"), (CONFIG, "NoneType")),
    BadFile("config is a number", raw_config("1e5"), (CONFIG, "float")),
    BadFile("config is no UTF-8", raw_config(b'{"peft_type": "LORA\xff"}'), (CONFIG, "utf-8")),
    BadFile("config in UTF-16", raw_config(json.dumps(GOOD_CONFIG).encode("utf-16")), (CONFIG, "utf-8")),
    BadFile("config with BOM", raw_config(b"\xef\xbb\xbf" + json.dumps(GOOD_CONFIG).encode()), (CONFIG, "JSON")),
    BadFile("config with NaN", json_config("lora_alpha", "NaN"), (CONFIG, "NaN is not JSON")),
    BadFile("config with Infinity", json_config("lora_alpha", "-Infinity"), (CONFIG, "-Infinity is not JSON")),
    BadFile("alpha that overflows", json_config("lora_alpha", "1e999"), (CONFIG, "lora_alpha")),
    BadFile("rank of 5000 digits", json_config("r", "9" * 5000), (CONFIG,), is_bomb=True),
    BadFile("one key twice", raw_config('{"peft_type": "LORA", "r": 2, "r": 4}'), (CONFIG, "'r'", "twice")),
    BadFile("config nested 100,000 deep", raw_config(_nested(10**5)), (CONFIG, "nested too deeply"), is_bomb=True),
    BadFile("lists nested 100,000 deep", json_config("loftq_config", _nested(10**5, "[", "]")),
            (CONFIG, "nested too deeply"), is_bomb=True),
    BadFile("config of 17 MiB", raw_config(json.dumps({**GOOD_CONFIG, "x": "y" * 17 * 2**20})),
            (CONFIG, "larger than 16 MiB"), is_bomb=True),
    BadFile("config with 200,000 empty lists",
            json_config("brand_new", "[" + ",".join(["[]"] * 200_000) + "]"), (CONFIG, "brand_new"),
            UnsupportedError, is_bomb=True),
    *(BadFile(f"r is absurd: {name}", config(r=value), (CONFIG, "r in")) for name, value in _ABSURD_RANKS.items()),
    *(
        BadFile(f"rank_pattern is absurd: {name}", config(rank_pattern={"q_proj": value}), (CONFIG, "rank_pattern"))
        for name, value in _ABSURD_RANKS.items()
    ),
    *(
        BadFile(f"lora_alpha is absurd: {name}", config(lora_alpha=value), (CONFIG, "lora_alpha"))
        for name, value in _ABSURD_ALPHAS.items()
    ),
    *(
        BadFile(f"alpha_pattern is absurd: {name}", config(alpha_pattern={"q_proj": value}), (CONFIG, "alpha_pattern"))
        for name, value in _ABSURD_ALPHAS.items()
    ),
    *(
        BadFile(f"{field} has a wrong type", config(**{field: value}), (CONFIG, field))
        for field, value in _WRONG_TYPES.items()
    ),
    *(
        BadFile(f"peft_type is {kind}", config(peft_type=kind), (CONFIG, "peft_type"), UnsupportedError)
        for kind in ("LOHA", "LOKR", "IA3", "PREFIX_TUNING", "lora", None, 1, ["LORA"], _HOSTILE)
    ),
    BadFile("peft_type is missing", lambda folder: write(folder, {"r": 2}), (CONFIG, "peft_type"), UnsupportedError),
    *(
        BadFile(f"{name} is not repaired", config(**{field: value}), (CONFIG, name, field), UnsupportedError)
        for name, field, value in (
            ("Arrow", "arrow_config", {"top_k": 2}),
            ("KaSA", "kasa_config", {"beta": 1e-4}),
            ("QALoRA", "use_qalora", True),
            ("Megatron", "megatron_config", {"a": 1}),
            ("aLoRA", "alora_invocation_tokens", [5, 6]),
        )
    ),
    *(
        BadFile(f"initialised by {init}", config(init_lora_weights=init), (CONFIG, init), UnsupportedError)
        for init in ("corda", "loftq", "pissa_niter_4", "brand_new")
    ),
    BadFile("a field of a future PEFT", config(brand_new={"a": 1}), (CONFIG, "brand_new"), UnsupportedError),
    BadFile("a field with a hostile name", config(**{_HOSTILE: True}),
            (CONFIG, "evil\\n::error::\\x1b[31m\\u202e"), UnsupportedError),
    *(
        BadFile(f"{field} key is {what}", config(**{field: {pattern: 2}}), (CONFIG, field), is_bomb=True)
        for field in ("rank_pattern", "alpha_pattern")
        for what, pattern in (
            ("no regular expression", "("),
            ("5000 brackets", "(" * 5000),
            ("10^12 repetitions", _REPEATS),
            ("a repetition too many", "x{99999999999999999999}"),
            ("a recursion without end", "(?R)"),
            ("fuzzy to one engine only", "(?:q_prof){e<=1}"),
            ("without end in its matching", r"(?:(?:[a-z_.]|\w|.)*)*(?:(?:.|\w)+)+\d(.)\1\1\1"),
        )
    ),
]  # fmt: skip

# Folders: something else lies in the place of a file

_FOLDERS = [
    BadFile("empty folder", lambda folder: None, (CONFIG, "missing")),
    BadFile("no config", without(CONFIG), (CONFIG, "missing")),
    BadFile("no weights", without(WEIGHTS), (WEIGHTS, "missing")),
    *(
        BadFile(f"only {name}", without(WEIGHTS, (name, PICKLED)), (name, "pickle"))
        for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin", "adapter.ckpt",
                     "adapter.pkl")
    ),
    BadFile("sharded with an index",
            without(WEIGHTS, ("adapter_model-00001-of-00002.safetensors", _SAVED),
                    ("adapter_model.safetensors.index.json", b'{"weight_map": {}}')),
            (WEIGHTS, "missing", "adapter_model-00001-of-00002.safetensors")),
    BadFile("two other safetensors", without(WEIGHTS, ("a.safetensors", _SAVED), ("b.safetensors", _SAVED)),
            (WEIGHTS, "a.safetensors, b.safetensors")),
    *(
        BadFile(f"{what} in the place of {name}", instead(name, put), (name, reason))
        for name in (CONFIG, WEIGHTS)
        for what, put, reason in (
            ("folder", Path.mkdir, "not a regular file"),
            ("pipe", os.mkfifo, "not a regular file"),
            ("socket", put_socket, "not a regular file"),
            ("endless device", put_device, "not a regular file"),
            ("unreadable file", put_unreadable, "cannot read"),
            ("link to nowhere", lambda path: path.symlink_to("gone"), "cannot read"),
            ("link in a loop", put_loop, "cannot read"),
            ("link to a file outside", put_link_outside, "leaves the folder"),
            ("link to a device", lambda path: path.symlink_to("/dev/zero"), "leaves the folder"),
            ("link to what is no Hub cache", put_link_to_other_cache, "leaves the folder"),
        )
    ),
]  # fmt: skip

BAD_FILES: tuple[BadFile, ...] = (*_CONTAINERS, *_TENSORS, *_CONFIGS, *_FOLDERS)
