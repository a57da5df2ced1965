"""Every variant of adapter: read as PEFT reads it, repaired, and read by PEFT again."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import make_adapter
from safetensors.torch import load_file
from torch import Tensor
from variants import GOOD, Variant

from csulora_cli import api
from csulora_cli.adapter import Adapter, bind, read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour
from csulora_cli.engine.attach import Update
from csulora_cli.engine.host import Host, load_host
from csulora_cli.formats.structure import structure_of
from csulora_cli.locate import Location
from csulora_cli.report import FixReport
from csulora_cli.settings import FixSettings

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 33, 12, 7, 3, 40]])
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Measured:
    """One variant: the repair's report, and how far logits are from PEFT's, as shares of what the adapter does.

    Attributes:
        report: of the repair.
        read_error: of the adapter as it was read.
        written_error: of what was written.
        before, after: the tensors of both files.
    """

    report: FixReport
    read_error: float
    written_error: float
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(api, "PROTECTED_TOKENS", 3)


@pytest.fixture(scope="module")
def measured(hosts: Callable[..., Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`measured(name)`: the variant made by PEFT, read, repaired, and loaded by PEFT again; each is done once."""

    @cache
    def measure(name: str) -> Measured:
        variant = GOOD[name]
        folder = tmp_path_factory.mktemp("variant")
        host_folder = hosts(variant.host)
        adapter = make_variant(variant, host_folder, folder / "adapter")
        out = folder / "out"
        report = fix_adapter(
            FixSettings(str(adapter), base=str(host_folder), out=out, prompts=prompts, strength=3.0, protect=0.5)
        )
        read = adapter
        if report.conversions:  # at λ = 0 what is written is the adapter as it was rewritten
            read = folder / "rewritten"
            fix_adapter(FixSettings(str(adapter), base=str(host_folder), out=read, prompts=prompts, strength=0.0))
        host = load_host(Location("host", host_folder), CPU, "auto", trust_remote_code=False)
        plain = logits(host.model)
        return Measured(
            report,
            gap(adapted_logits(host, read), peft_logits(host_folder, adapter), plain),
            gap(adapted_logits(host, out), peft_logits(host_folder, out), plain),
            load_file(adapter / WEIGHTS),
            load_file(out / WEIGHTS),
        )

    return measure


def make_variant(variant: Variant, host: Path, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights and of what targets nothing
        make_adapter(host, folder, **variant.options)
    if variant.change is not None:
        variant.change(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def peft_logits(host: Path, adapter: Path) -> Tensor:
    """What PEFT makes of an adapter; a key that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return logits(oracle.with_adapter(host, adapter))


def adapted_logits(host: Host, folder: Path) -> Tensor:
    adapter: Adapter = bind(read_adapter(folder), structure_of(host.model))
    with host.adapted(Update.of(adapter)):
        return logits(host.model)


def gap(ours: Tensor, theirs: Tensor, plain: Tensor) -> float:
    return float((ours - theirs).norm() / (theirs - plain).norm())


@pytest.mark.parametrize("name", GOOD)
def test_a_good_variant_is_repaired(name: str, measured: Callable[[str], Measured]) -> None:
    found = measured(name)
    report = found.report
    # The update is PEFT's, and PEFT reads what was written as it was meant.
    assert found.read_error < 2e-5
    assert found.written_error < 2e-5
    # It moved, in no module against the objective, and every tensor is accounted for.
    assert report.moved > 0
    counts = dict(report.tensors)
    assert counts.pop("total") == sum(counts.values()) == len(found.before)
    assert counts["changed"] > 0
    assert {record.key for record in report.carried} <= found.after.keys()
    if not report.conversions:
        assert_only_factors_changed(found)


def assert_only_factors_changed(found: Measured) -> None:
    """Same keys, shapes and dtypes; B and whatever is no factor keeps every bit."""
    assert found.before.keys() == found.after.keys()
    for key, tensor in found.before.items():
        assert found.after[key].shape == tensor.shape
        assert found.after[key].dtype == tensor.dtype
        if "lora_A" not in key and "lora_embedding_A" not in key:
            assert torch.equal(found.after[key], tensor), key
