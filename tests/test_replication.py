"""Repeated layers: what the config may say, and the grown host beside PEFT's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch

from csulora_cli.errors import AdapterError, HostError, UnsupportedError
from csulora_cli.formats.replication import MAX_LAYERS, Repeats, Replication, grow, replication_of
from csulora_cli.opening import common_replication

IDS = torch.tensor([[1, 5, 9, 33]])


@pytest.mark.parametrize(
    "ranges",
    ["0-2", [0, 2], [[0, 1, 2]], [[0, True]], [[-1, 1]], [[2, 1]], [[1, 1]], [[0, 1.0]], [[0, 10**9]],
     [[0, MAX_LAYERS], [0, 1]]],
)  # fmt: skip
def test_what_gives_no_layers_is_refused(ranges: Any) -> None:
    with pytest.raises(AdapterError, match="layer_replication"):
        replication_of({"layer_replication": ranges})


@pytest.mark.parametrize("ranges", [None, []])
def test_nothing_is_repeated(ranges: Any) -> None:
    assert replication_of({"layer_replication": ranges}) is None


def test_the_grown_host_is_pefts(hosts: Callable[..., Path]) -> None:
    ranges = [[0, 2], [1, 2], [0, 1]]
    ours, theirs = oracle.load(hosts("llama")), oracle.load(hosts("llama"))
    memory = {parameter.data_ptr() for parameter in ours.parameters()}
    repeats = grow(ours, replication_of({"layer_replication": ranges}))
    peft.tuners.tuners_utils.replicate_layers(theirs, ranges)
    assert repeats == Repeats("model.layers", (0, 1, 1, 0))
    assert {parameter.data_ptr() for parameter in ours.parameters()} == memory
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **settings), theirs.generate(IDS, **settings))


def test_names_are_those_of_the_stored_layers() -> None:
    repeats = Repeats("model.layers", (0, 1, 1))
    assert repeats.stored("model.layers.2.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert repeats.stored("model.layers.2") == "model.layers.1"
    assert repeats.stored("lm_head.weight") == "lm_head.weight"


def test_a_host_of_fewer_layers_is_refused(hosts: Callable[..., Path]) -> None:
    with pytest.raises(HostError, match="the host has 2 layers"):
        grow(oracle.load(hosts("llama")), Replication(((0, 3),)))


def test_adapters_that_repeat_different_layers_have_no_common_host() -> None:
    one, other = Replication(((0, 2),)), Replication(((0, 1),))
    assert common_replication([one, one]) == one
    assert common_replication([]) is None
    with pytest.raises(UnsupportedError, match="repeat different layers"):
        common_replication([one, other])
    with pytest.raises(UnsupportedError, match="repeat different layers"):
        common_replication([one, None])
