"""Benchmarks: what the parts of a repair cost, as ratios measured in one run.

    python scripts/bench.py solver         one λ with K and without, against one eigendecomposition for all λ
    python scripts/bench.py weights        the weights source against reading both checkpoints, and against dense SVD

Times are the best of three on the threads that torch takes; run it on an idle machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from csulora_cli.checkpoint import Checkpoint, WeightMatch
from csulora_cli.engine.progress import Silent
from csulora_cli.engine.weights_source import measure_displacements
from csulora_cli.formats.site import Site
from csulora_cli.solver.attenuate import by_moments, by_tokens, contrast


def best_of(function: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def bench_solver() -> None:
    """One λ with K and without, by tokens, and what serves every λ of one β: K, or an eigendecomposition in its place.

    The eigendecomposition takes as much as K to prepare, so that the last column is the number of λ at which both cost
    the same.
    """
    columns = ("in", "tokens", "with K s", "without s", "tokens s", "K s", "eigh s", "eigh/with K")
    print(*(f"{column:>9}" for column in columns))
    generator = torch.Generator().manual_seed(0)
    for features, tokens in ((576, 4096), (1536, 4096), (2048, 4096), (4096, 2048)):
        inputs = torch.randn(features, tokens, generator=generator, dtype=torch.float64) / tokens**0.5
        faded, benign = inputs[:, : tokens // 2].contiguous(), inputs[:, tokens // 2 :].contiguous()
        moment_h, moment_b = faded @ faded.mT, benign @ benign.mT
        stacked = torch.randn(48, features, generator=generator, dtype=torch.float64)
        args = (stacked, moment_h, moment_b, 1.0, 3.0)
        held = contrast(moment_h, moment_b, 1.0)
        fast = best_of(partial(by_moments, *args, held))
        sure = best_of(partial(by_moments, *args))
        by_token = best_of(partial(by_tokens, stacked, faded, benign, 1.0, 3.0))
        once = best_of(partial(contrast, moment_h, moment_b, 1.0))
        eigen = best_of(partial(torch.linalg.eigh, moment_h), 1)
        times = (fast, sure, by_token, once, eigen)
        print(f"{features:>9} {tokens:>9}", *(f"{time:>9.3f}" for time in times), f"{eigen / fast:>11.1f}")


SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
          "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}  # fmt: skip


def make_pair(folder: Path, layers: int) -> list[Site]:
    """A host and an unaligned checkpoint in Llama-3.2-1B shapes, D of rank 200 with σᵢ ~ i^-0.7 and 5 % noise."""
    generator = torch.Generator().manual_seed(0)
    host, unaligned, modules = {}, {}, []
    for layer in range(layers):
        for kind, (rows, columns) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}"
            weight = torch.randn(rows, columns, generator=generator) * 0.02
            left = torch.linalg.qr(torch.randn(rows, 200, generator=generator)).Q
            right = torch.linalg.qr(torch.randn(columns, 200, generator=generator)).Q
            change = (left * torch.arange(1, 201) ** -0.7) @ right.mT
            change += torch.randn(rows, columns, generator=generator) * (0.05 * change.square().mean()).sqrt()
            change *= 0.03 * weight.norm() / change.norm()
            unaligned[f"{name}.weight"] = weight.bfloat16()
            host[f"{name}.weight"] = (weight + change).bfloat16()
            modules.append(Site(name, torch.zeros(16, columns), torch.zeros(rows, 16), 16.0, 1.0))
    for role, tensors in (("host", host), ("unaligned", unaligned)):
        (folder / role).mkdir()
        save_file(tensors, folder / role / "model.safetensors", {"format": "pt"})
    return modules


def read_all(folder: Path) -> float:
    """Read every byte of both checkpoints; returns gigabytes."""
    total = 0
    for file in sorted(folder.glob("*/*.safetensors")):
        with file.open("rb") as handle:
            while block := handle.read(2**24):
                total += len(block)
    return total / 1e9


def bench_weights(layers: int) -> None:
    """Directions of every module of some layers, streamed from bf16 files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        modules = make_pair(folder, layers)
        gigabytes = read_all(folder)
        floor = best_of(lambda: read_all(folder))
        matches = {module.name: WeightMatch(f"{module.name}.weight", False) for module in modules}
        with Checkpoint(folder / "host", "host") as host, Checkpoint(folder / "unaligned", "unaligned") as unaligned:

            def stream() -> None:
                measure_displacements(
                    modules, (host, matches), (unaligned, matches), 0.9, None, torch.device("cpu"), Silent()
                )

            ours = best_of(stream, 2)
            start = time.perf_counter()
            for module in modules[:7]:
                key = f"{module.name}.weight"
                torch.linalg.svd(host.read(key).float() - unaligned.read(key).float(), full_matrices=False)
            dense = (time.perf_counter() - start) * layers
    print(f"{layers} layers, {len(modules)} modules, {gigabytes:.2f} GB in both checkpoints")
    print(f"reading both          {floor:8.2f} s")
    print(f"directions, streamed  {ours:8.2f} s   {ours / floor:6.1f} x reading")
    print(f"dense SVD             {dense:8.2f} s   {dense / ours:6.1f} x ours (one layer measured)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("solver", "weights"))
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    if args.part == "solver":
        bench_solver()
    else:
        bench_weights(args.layers)


if __name__ == "__main__":
    main()
