"""Fuzz what reads files from strangers: adapters (config and weights) and settings files.

    python scripts/fuzz.py                        # 100,000 inputs, mutated from valid files, a seed for each run
    python scripts/fuzz.py --coverage --runs 1000000   # guided by coverage, by atheris (pip install atheris)

Whatever is read, nothing may come out but a sound adapter or an error of our own, fit to print and in bounded time. The
first input that breaks this is kept (--keep FILE) and the exception is shown.
"""

import argparse
import inspect
import json
import math
import random
import struct
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from csulora_cli.adapter import read_adapter
from csulora_cli.errors import CsuloraError
from csulora_cli.formats.config import CONFIG_NAME
from csulora_cli.formats.dialect import PEFT
from csulora_cli.settings import TABLES, read_config_file

SECONDS = 10.0  # of CPU time; patterns have 5 s in all, nothing else takes long
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_SIZE = struct.Struct("<I")
_NAME = "model.layers.{layer}.self_attn.{module}_proj"


@dataclass(frozen=True)
class Case:
    """One input: the bytes of both files of an adapter."""

    config: bytes
    weights: bytes

    def packed(self) -> bytes:
        """As one piece of bytes, which `unpacked` takes apart."""
        return _SIZE.pack(len(self.config)) + self.config + self.weights

    @classmethod
    def unpacked(cls, data: bytes) -> "Case":
        """Any bytes as a case."""
        size = _SIZE.unpack(data[:4].ljust(4, b"\0"))[0]
        return cls(data[4 : 4 + size], data[4 + size :])


# Valid files to begin with


def seeds() -> list[Case]:
    """Small valid adapters that reach what the reader knows."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {}
        for layer, module, rank in ((0, "q", 2), (0, "v", 3), (11, "q", 2)):
            prefix = f"base_model.model.{_NAME.format(layer=layer, module=module)}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, 5, generator=generator).to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(4, rank, generator=generator).to(dtype)
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
            "rank_pattern": {"v_proj": 3}, "alpha_pattern": {r"layers\.\d+\..*q_proj": 6, "v_proj": 1.5},
            "use_rslora": dtype is torch.float16, "init_lora_weights": True, "fan_in_fan_out": False,
            "base_model_name_or_path": "org/host", "modules_to_save": None, "lora_dropout": 0.05,
        }  # fmt: skip
        cases.append(Case(json.dumps(config).encode(), save(tensors, metadata={"format": "pt"})))
    return cases


SETTINGS_SEED = b"""[fix]
strength = 2.5
target = 0.05
protect = 1
geometry = "keep-in"
device = "cpu"
overwrite = true
"""

# Mutations

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "LORA", "q_proj", "none", "all",
    "(", ".*", "(a|a)*", "(?:x){e<=3}", "a{1000}{1000}", "\x1b[31m\n\u202e", [], {}, [[]], {"a": {"b": [1]}},
    ["q_proj"], "pissa", "corda", {"q_proj": 3}, {".*": 2}, {"(": 1}, [0, 1], "x" * 3000,
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\\u0000", b"NaN", b"1e999", b"9" * 400,
          b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 2000)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F64", "I8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "F3", "", 5)


def mutate(case: Case, draw: random.Random) -> Case:
    """One to four changes, in the bytes of a file or in what they mean."""
    for _ in range(draw.randint(1, 4)):
        case = draw.choice((_config_bytes, _config_values, _weights_bytes, _weights_header))(case, draw)
    return case


def _config_bytes(case: Case, draw: random.Random) -> Case:
    return Case(damaged(case.config, draw), case.weights)


def _weights_bytes(case: Case, draw: random.Random) -> Case:
    return Case(case.config, damaged(case.weights, draw))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The data with some bytes changed, put in, repeated or left out."""
    place = draw.randint(0, len(data))
    length = min(draw.choice((1, 1, 1, 2, 4, 8, 64)), len(data) - place)
    piece = data[place : place + length]
    kind = draw.randrange(6)
    if kind == 0:
        piece = bytes(byte ^ 1 << draw.randrange(8) for byte in piece)
    elif kind == 1:
        piece = draw.randbytes(length)
    elif kind == 2:
        piece += draw.choice(_BYTES)
    elif kind == 3:
        piece = piece * draw.randint(2, 50)
    elif kind == 4:
        piece = b""
    else:
        return data[:place]
    return data[:place] + piece + data[place + length :]


def _config_values(case: Case, draw: random.Random) -> Case:
    try:
        config = json.loads(case.config)
    except (ValueError, RecursionError):
        return case
    return Case(_dumped(changed(config, draw)), case.weights)


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value in which one thing somewhere is another, is gone, or is there as well."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(5)
        if kind == 0:
            return {other: entry for other, entry in value.items() if other != key}
        if kind == 1:
            return {**value, str(draw.choice(_VALUES)): draw.choice(_VALUES)}
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], changed(value[place], draw), *value[place + draw.randrange(2) :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, -4, 4, 256, 2**32))
    return draw.choice(_VALUES)


def _weights_header(case: Case, draw: random.Random) -> Case:
    length = int.from_bytes(case.weights[:8], "little")
    try:
        header = json.loads(case.weights[8 : 8 + length])
        entry = header[draw.choice(list(header))]
        field = draw.choice(("dtype", "shape", "data_offsets"))
        entry[field] = draw.choice(_DTYPES) if field == "dtype" else changed(entry[field], draw)
    except (ValueError, RecursionError, IndexError, KeyError, TypeError):
        return case
    if draw.random() < 0.3:
        header = changed(header, draw)
    text = _dumped(header)
    return Case(case.config, len(text).to_bytes(8, "little") + text + case.weights[8 + length :])


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


# What must hold


class BrokenPromiseError(Exception):
    """Something that may not happen did."""


def check_case(case: Case, folder: Path) -> str:
    """Read an adapter. Returns what came of it: `read`, or the name of the error of our own.

    Raises:
        BrokenPromiseError: the adapter that was read is not sound, or the error is not fit to print, or it took long.
        Exception: anything else that the reader raises is a crash.
    """
    (folder / CONFIG_NAME).write_bytes(case.config)
    (folder / PEFT.weights_name).write_bytes(case.weights)
    return _checked(lambda: _check_sound(read_adapter(folder)))


def check_settings(data: bytes, folder: Path) -> str:
    """Read a settings file, as `check_case` does an adapter."""
    path = folder / "settings.toml"
    path.write_bytes(data)

    def read() -> None:
        for command, kind in TABLES.items():
            kind(**{**_required(kind), **read_config_file(path, command)})

    return _checked(read)


def _required(kind: Any) -> dict[str, Any]:
    """What has no default stands on the command line: the adapter, or several."""
    return {
        field.name: ("a",) if "tuple" in str(field.type) else "a" for field in fields(kind) if field.default is MISSING
    }


def _checked(read: Callable[[], None]) -> str:
    started = time.process_time()
    try:
        read()
        result = "read"
    except CsuloraError as error:
        if error.exit_code not in (2, 4):
            raise BrokenPromiseError(f"exit code {error.exit_code}") from error
        for text in (error.message, error.hint):
            if len(text) > 1500 or {unicodedata.category(char) for char in text} & _UNPRINTABLE:
                raise BrokenPromiseError(f"not fit to print: {text!r}") from error
        if not error.message:
            raise BrokenPromiseError("an error without a message") from error
        result = type(error).__name__
    if (seconds := time.process_time() - started) > SECONDS:
        raise BrokenPromiseError(f"it took {seconds:.1f} s")
    return result


def _check_sound(adapter: Any) -> None:
    if not adapter.sites:
        raise BrokenPromiseError("an adapter without modules")
    for module in adapter.sites:
        rank = module.lora_a.shape[0]
        if module.lora_b.shape[1] != rank or not math.isfinite(module.scale):
            raise BrokenPromiseError(f"{module.name!r} is not sound")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (module.lora_a, module.lora_b)):
            raise BrokenPromiseError(f"{module.name!r} is not finite")


# Running


def fuzz(runs: int, seed: int, keep: Path | None = None) -> Counter[str]:
    """Mutated adapters, and a settings file for every tenth of them; counts what came of them.

    Raises:
        Exception: of the first input that breaks a promise; it is in `keep` then.
    """
    draw, valid, outcomes = random.Random(seed), seeds(), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(runs):
            if index % 10 == 9:
                data = SETTINGS_SEED
                for _ in range(draw.randint(1, 4)):
                    data = damaged(data, draw)
                outcomes[f"settings: {_kept(check_settings, data, data, folder, keep)}"] += 1
            else:
                case = mutate(draw.choice(valid), draw)
                outcomes[f"adapter: {_kept(check_case, case, case.packed(), folder, keep)}"] += 1
    return outcomes


def _kept(check: Callable[[Any, Path], str], value: Any, data: bytes, folder: Path, keep: Path | None) -> str:
    try:
        return check(value, folder)
    except BaseException:
        if keep is not None:
            keep.write_bytes(data)
        raise


def fuzz_by_coverage(runs: int, seed: int) -> None:
    """Let atheris choose the adapters; ends the process."""
    import atheris

    for name in [name for name in sys.modules if name.startswith("csulora_cli")]:
        for value in vars(sys.modules[name]).values():
            function = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(function) and function.__module__ == name:
                atheris.instrument_func(function)
    folder, corpus = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    for index, case in enumerate(seeds()):
        (corpus / str(index)).write_bytes(case.packed())

    def mutated(data: bytes, max_size: int, mutation_seed: int) -> bytes:
        draw = random.Random(mutation_seed)
        return mutate(Case.unpacked(data), draw).packed()[:max_size]

    atheris.Setup(
        [sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-verbosity=1", str(corpus)],
        lambda data: check_case(Case.unpacked(data), folder) and None,
        custom_mutator=mutated,
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the readers of adapters and settings files.")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to keep the first input that breaks a promise")
    parser.add_argument("--coverage", action="store_true", help="guided by coverage (needs atheris)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.coverage:
        fuzz_by_coverage(args.runs, args.seed)
        return
    started = time.perf_counter()
    outcomes = fuzz(args.runs, args.seed, args.keep)
    for name, count in outcomes.most_common():
        print(f"{count:8} {name}")
    print(f"{args.runs} inputs in {time.perf_counter() - started:.0f} s, no promise broken")


if __name__ == "__main__":
    main()
