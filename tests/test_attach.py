"""What sites of every kind read, against moments computed one prompt at a time, and how updates are applied."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATE
from torch import Tensor, nn

from csulora_cli.engine.attach import Factors, Update, watching, weight_of
from csulora_cli.engine.host import Host, load_host
from csulora_cli.engine.inputs import DirectionPrompts, Form, Side, collect_moments, group_sites
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.locate import Location
from csulora_cli.promptset import Prompts

CPU = torch.device("cpu")
TURN = 2
HARMFUL = [[1, 5, 9, 33, 12, 7, 3], [1, 8, 7, 3], [1, 60, 5, 5, 9, 41, 22, 11, 2, 7, 3]]
BENIGN = [[1, 20, 21, 7, 3, 9], [1, 5, 7, 3, 30], [1, 8, 50, 9, 7, 3, 40, 41], [1, 60, 7, 3]]
PROMPTS = DirectionPrompts(Side(HARMFUL, [7, 4, 11], TURN, 0.04), Side(BENIGN, [5, 4, 6, 4], TURN, 1.0, replies=2))


def opened(folder: Path) -> Host:
    return load_host(Location("host", folder), CPU, "float32", trust_remote_code=False)


def site(name: str, place: Place, in_features: int, out_features: int) -> Site:
    return Site(name, torch.zeros(2, in_features), torch.zeros(out_features, 2), 2.0, 1.0, place)


def counts(side: Side) -> list[list[float]]:
    """How often each token counts: the first as its side says, the prompt's last ones 25 times, an answer once.

    Of the last prompts, as many as there are replies, the answer alone counts.
    """
    rows = [
        [side.sink or 0.0, *(25.0 if end - TURN <= place < end else 1.0 for place in range(1, len(ids)))]
        for ids, end in zip(side.tokens, side.ends, strict=True)
    ]
    for row, end in list(zip(rows, side.ends, strict=True))[len(rows) - side.replies :]:
        row[:end] = [0.0] * end
    return rows


def moment(prompts: list[Tensor]) -> Tensor:
    """The moment of all rows, scaled by what all but the first of each prompt have."""
    rows = torch.cat(prompts).double()
    total = sum(float(own[1:].double().square().sum()) for own in prompts)
    return rows.mT @ rows * (rows.shape[1] / total if total > 0 else 0.0)


def expected(host: Host, side: Side, read: Callable[[nn.Module, list[int]], Tensor]) -> Tensor:
    """The moment of what `read` gives for every token of every prompt, run alone."""
    rows = [
        read(host.model, ids) * torch.tensor(weights)[:, None].sqrt()
        for ids, weights in zip(side.tokens, counts(side), strict=True)
    ]
    return moment(rows)


def collected(host: Host, sites: list[Site]) -> dict[str, Any]:
    groups = group_sites(host, sites, HARMFUL[0])
    found = collect_moments(host, groups, PROMPTS, CPU, lambda _: None)
    return {name: moments for group, moments in found.items() for name in group.members}


def check(host: Host, one: Site, read: Callable[[nn.Module, list[int]], Tensor]) -> None:
    compare(collected(host, [one])[one.name], host, read)


def dense(side: Tensor, form: Form) -> Tensor:
    """The moment (in, in) of one side, whatever its form."""
    if form is Form.DIAGONAL:
        return torch.diag(side)
    return side @ side.mT if form is Form.TOKENS else side


def compare(found: Any, host: Host, read: Callable[[nn.Module, list[int]], Tensor]) -> None:
    for side, have in ((PROMPTS.faded, found.faded), (PROMPTS.benign, found.benign)):
        want = expected(host, side, read)
        torch.testing.assert_close(dense(have, found.form), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "template", "has_sink"),
    [
        ("llama", TEMPLATE, True),
        ("llama", None, True),  # "User:"
        ("llama", "{{ messages[0]['content'] }} <assistant>", False),  # prompts begin with their own words
        ("t5", None, False),  # an encoder's first token reads all others
    ],
)
def test_a_first_token_that_all_prompts_share_counts_apart(
    kind: str, template: str | None, has_sink: bool, hosts: Callable[..., Path]
) -> None:
    host = opened(hosts(kind, template=template))
    prompts = Prompts(harmful=("steal w5",), lookalikes=("make w1 w2", "tell me w3"), general=("explain w4",))
    bare = DirectionPrompts.encode(host, prompts)
    whole = [host.encode(text) for text in (*prompts.lookalikes, *prompts.general)]
    assert [*bare.faded.tokens, *bare.benign.tokens] == whole
    assert (bare.faded.sink, bare.benign.sink) == ((0.04, 1.0) if has_sink else (None, None))
    lengths = [len(ids) for ids in whole]
    assert bare.tokens == (lengths[0] + lengths[1] - has_sink, lengths[2])  # two prompts, one first token

    answered = bare.answered([[1, 8, 9], [1, 9]], [[30, 31, 32], [33], []])
    assert answered.tokens == (bare.tokens[0], bare.tokens[1] + 3 + 1)
    assert answered.benign.tokens == [[*bare.benign.tokens[0], 30, 31, 32], [1, 8, 9, 33], [1, 9]]
    assert (answered.benign.ends, answered.benign.replies) == ([*bare.benign.ends, 3, 2], 2)
    other = answered.fading_on([[9] * 6])
    assert (other.faded.count, other.faded.ends, other.faded.turn) == (6, [6], bare.faded.turn)
    assert other.benign == answered.benign


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_an_embedding_reads_unit_vectors(kind: str, hosts: Callable[..., Path]) -> None:
    name = {"gpt2": "transformer.wte"}.get(kind, "model.embed_tokens")
    one = site(name, Place(name, Kind.EMBEDDING), 64, 32)
    check(opened(hosts(kind)), one, lambda _model, ids: nn.functional.one_hot(torch.tensor(ids), 64).float())


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_an_output_layer_reads_every_token_also_where_few_logits_are_asked_for(
    kind: str, hosts: Callable[..., Path]
) -> None:
    def read(model: Any, ids: list[int]) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model.model(torch.tensor([ids])).last_hidden_state[0]
        return hidden

    check(opened(hosts(kind)), site("lm_head", Place("lm_head"), 32, 64), read)


@pytest.mark.parametrize("keeps_tokens", [True, False])
def test_the_digits_of_all_other_tokens_stay_beside_a_massive_sink(
    keeps_tokens: bool, hosts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csulora_cli.engine.inputs.uses_tokens", lambda _group, _tokens: keeps_tokens)
    host, name, features = opened(hosts("llama")), "model.layers.0.mlp.down_proj", 48
    seen: list[Tensor] = []

    def enlarge(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        first = torch.arange(args[0].shape[1])[:, None] == 0
        seen.append(args[0] * torch.where(first, 3e5, 1.0))
        return (seen[-1],)

    host.model.get_submodule(name).register_forward_pre_hook(enlarge)
    found = collected(host, [site(name, Place(name), features, 32)])[name]

    def read(model: nn.Module, ids: list[int]) -> Tensor:
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([ids]))
        return seen[0][0]

    for side, kept in ((PROMPTS.faded, found.faded), (PROMPTS.benign, found.benign)):
        have = dense(kept, found.form)
        assert float(have.trace()) > 1e6 * features
        sink = read(host.model, side.tokens[0][:1]).double().mT  # (in, 1)
        across = torch.linalg.qr(sink, mode="complete").Q[:, 1:]  # (in, in - 1)
        want = expected(host, side, read)
        torch.testing.assert_close(across.mT @ have @ across, across.mT @ want @ across, rtol=1e-3, atol=1e-2)


def test_a_convolution_reads_the_tokens_in_its_window(hosts: Callable[..., Path]) -> None:
    def read(model: Any, ids: list[int]) -> Tensor:
        hidden = model.embed(torch.tensor(ids)).detach()  # (T, in)
        padded = torch.cat([torch.zeros(2, hidden.shape[1]), hidden])
        return torch.stack([padded[place : place + 3].mT.flatten() for place in range(len(ids))])

    name = "layers.0.mix"
    check(opened(hosts("convolution")), site(name, Place(name, Kind.CONVOLUTION), 96, 32), read)


def mixed(model: Any, ids: list[int], layer: int) -> tuple[Any, tuple[Tensor, ...]]:
    """The experts of a layer and what they are called with."""
    seen: list[tuple[Tensor, ...]] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return experts, seen[0]


def routed(model: Any, ids: list[int], expert: int, parameter: str) -> Tensor:
    """What one expert's weight reads for each token, (T, in); zero where a token goes to others."""
    experts, (hidden, index, *_) = mixed(model, ids, 1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    is_sent = (index.reshape(len(hidden), -1) == expert).any(1)[:, None]
    if parameter == "gate_up_proj":
        return hidden * is_sent
    weight = experts.gate_up_proj[expert].detach()
    if experts.is_transposed:
        inner = experts._apply_gate(hidden @ weight + experts.gate_up_proj_bias[expert].detach())
    else:
        gate, up = (hidden @ weight.mT).chunk(2, dim=-1)
        inner = experts.act_fn(gate) * up
    return inner.detach() * is_sent


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_an_expert_reads_the_tokens_that_are_sent_to_it(kind: str, parameter: str, hosts: Callable[..., Path]) -> None:
    host = opened(hosts(kind))
    experts = host.model.model.layers[1].mlp.experts
    count, rows, columns = experts.get_parameter(parameter).shape
    out_features, in_features = (columns, rows) if experts.is_transposed else (rows, columns)
    module = "model.layers.1.mlp.experts"
    sites = [
        site(
            f"expert {expert}",
            Place(module, Kind.PARAMETER, parameter, expert, experts.is_transposed),
            in_features,
            out_features,
        )
        for expert in range(count)
    ]
    for expert, moments in enumerate(collected(host, sites).values()):
        compare(moments, host, lambda model, ids, expert=expert: routed(model, ids, expert, parameter))


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "gate"), ("qwen3-moe", "gate"), ("gpt-oss", "router")])
def test_a_router_reads_every_token(kind: str, name: str, hosts: Callable[..., Path]) -> None:
    def read(model: Any, ids: list[int]) -> Tensor:
        _, (hidden, *_) = mixed(model, ids, 0)
        return hidden.reshape(-1, hidden.shape[-1])

    module = f"model.layers.0.mlp.{name}"
    check(opened(hosts(kind)), site(module, Place(module, Kind.PARAMETER), 32, 4), read)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("llama", Place("model.layers.0.mlp.up_proj")),
        ("llama", Place("model.embed_tokens", Kind.EMBEDDING)),
        ("convolution", Place("layers.0.mix", Kind.CONVOLUTION)),
        ("mixtral", Place("model.layers.0.mlp.gate", Kind.PARAMETER)),
    ],
)
def test_inputs_that_are_not_one_row_a_token_are_refused(kind: str, place: Place, hosts: Callable[..., Path]) -> None:
    host = opened(hosts(kind))
    (batch,) = host.batches([[1, 5, 7, 3]])
    watched = watching(host.model, {"site": place}, [torch.ones(1, 9)], lambda *_: None)
    with pytest.raises(HostError, match=re.escape(place.module)), watched:
        host.run(batch)


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), (1, 8, 4, 4), "does not run along the tokens"),
        (nn.Conv3d(8, 8, 3, padding=1), (1, 8, 4, 4, 4), "does not run along the tokens"),
        (nn.Conv1d(4, 8, 3, padding=1), (1, 4, 8), "does not run along the tokens"),  # along the channels
        (nn.Conv1d(8, 8, 2, stride=2), (1, 8, 4), "does not run along the tokens"),
        (nn.Conv1d(8, 8, 3), (1, 8, 4), "gives fewer outputs than there are tokens"),
    ],
)
def test_a_convolution_over_anything_but_tokens_is_refused(
    layer: nn.Module, inputs: tuple[int, ...], message: str
) -> None:
    model = nn.ModuleDict({"mix": layer})
    watched = watching(model, {"site": Place("mix", Kind.CONVOLUTION)}, [torch.ones(1, 4)], lambda *_: None)
    with pytest.raises(HostError, match=f"'mix' is a convolution that {message}") as caught, watched:
        layer(torch.ones(inputs))
    assert caught.value.hint == "The prompts source cannot repair this module; use --unaligned without --protect."


@pytest.mark.parametrize(
    ("kind", "place", "shape"),
    [
        ("llama", Place("model.layers.0.self_attn.k_proj"), (16, 32)),
        ("gpt2", Place("transformer.h.0.attn.c_attn"), (96, 32)),
        ("llama", Place("model.embed_tokens", Kind.EMBEDDING), (32, 64)),
        ("convolution", Place("layers.0.mix", Kind.CONVOLUTION), (32, 96)),
        ("mixtral", Place("model.layers.0.mlp.experts", Kind.PARAMETER, "down_proj", 2), (32, 48)),
        ("gpt-oss", Place("model.layers.0.mlp.experts", Kind.PARAMETER, "down_proj", 2, True), (32, 48)),
    ],
)
def test_an_update_acts_as_a_changed_weight_and_goes_again(
    kind: str, place: Place, shape: tuple[int, int], hosts: Callable[..., Path]
) -> None:
    host = opened(hosts(kind))
    before = host.first_token_log_probs(HARMFUL)
    generator = torch.Generator().manual_seed(0)
    lora_a, lora_b = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)
    with host.adapted(Update({"site": Factors(lora_a, lora_b, 0.1, None, place)})):
        adapted = host.first_token_log_probs(HARMFUL)
    assert torch.equal(host.first_token_log_probs(HARMFUL), before)

    weight = weight_of(host.model, place)
    assert weight.shape == shape
    stored = host.model.get_submodule(place.module).get_parameter(place.parameter)
    part = stored.data if place.expert is None else stored.data[place.expert]
    changed = weight + 0.1 * lora_b @ lora_a
    is_swapped = place.is_transposed or place.kind is Kind.EMBEDDING or kind == "gpt2"
    part.copy_(changed.mT if is_swapped else changed.reshape(part.shape))
    torch.testing.assert_close(host.first_token_log_probs(HARMFUL), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, before, atol=1e-3)
