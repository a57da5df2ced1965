"""Kinds of models that no command runs: refused by name, from their small files, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from refused_hosts import REFUSED_HOSTS, RefusedHost, quantised

from csulora_cli.api import fix_adapter
from csulora_cli.comparison import compare_methods
from csulora_cli.errors import HostError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.locate import Location
from csulora_cli.model_kind import check_model_kind
from csulora_cli.settings import CompareSettings, EvalSettings, FixSettings


@pytest.fixture
def refusals(adapters: Callable[..., Path], prompts: Path, tmp_path: Path) -> Callable[[str], list[HostError]]:
    """`refusals(host)` is what `fix`, `eval` and `compare` say of a host."""
    adapter = str(adapters("llama"))

    def raised(host: str) -> list[HostError]:
        calls: list[Callable[[], Any]] = [
            lambda: fix_adapter(FixSettings(adapter, base=host, out=tmp_path / "out", prompts=prompts)),
            lambda: evaluate_adapters(EvalSettings((adapter,), host, prompts=prompts)),
            lambda: compare_methods(CompareSettings(adapter, host, prompts=prompts, out=tmp_path / "out")),
        ]
        found = []
        for call in calls:
            with pytest.raises(HostError) as caught:
                call()
            found.append(caught.value)
        return found

    return raised


@pytest.mark.parametrize("name", REFUSED_HOSTS)
def test_every_command_refuses_the_host_by_name(
    name: str, refusals: Callable[[str], list[HostError]], tmp_path: Path
) -> None:
    host = REFUSED_HOSTS[name].write(tmp_path / "host")
    for error in refusals(str(host)):
        assert error.message == f"the host {host} {REFUSED_HOSTS[name].message}"
        assert error.hint
        assert error.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED_HOSTS)
def test_an_unaligned_model_of_such_a_kind_is_refused(
    name: str, hosts: Callable[..., Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    unaligned = REFUSED_HOSTS[name].write(tmp_path / "unaligned")
    settings = FixSettings(
        str(adapters("llama")), base=str(hosts("llama")), unaligned=str(unaligned), out=tmp_path / "o"
    )
    with pytest.raises(HostError) as caught:
        fix_adapter(settings)
    assert caught.value.message == f"the unaligned model {unaligned} {REFUSED_HOSTS[name].message}"
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["fix", "eval", "compare"])
def test_the_command_line_says_it_in_two_lines(
    command: str, csulora: Callable[..., Ran], adapters: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    host = quantised("", quant_method="gptq\x1b[31m", bits=4).write(tmp_path / "host")
    out = () if command == "eval" else ("--out", tmp_path / "out")
    ran = csulora(command, adapters("llama"), "--base", host, "--prompts", prompts, *out)
    assert ran.code == 4
    assert ran.out == ""
    assert ran.error == f"the host {host} is quantised (gptq\\x1b[31m, 4 bits)"
    assert ran.hint == "Give the full-precision model that it was made from."
    assert not (tmp_path / "out").exists()


def test_plain_models_pass(hosts: Callable[..., Path], tmp_path: Path) -> None:
    for kind in ("llama", "t5", "bart"):
        check_model_kind(Location("host", hosts(kind)), "host")
    own = RefusedHost("", {"quantization_config": None, "is_encoder_decoder": False}).write(tmp_path / "host")
    check_model_kind(Location("host", own), "host")
