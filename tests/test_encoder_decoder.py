"""Encoder-decoder hosts, end to end: against PEFT, and against plain loops over one prompt at a time.

Which side a module reads is told here by its name: what is in the encoder, and the keys and values of cross-attention.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Ran, make_tokenizer
from test_roundtrip import assert_peft_takes_every_tensor
from torch import Tensor, nn

from csulora_cli.adapter import bind, read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, prompts_source
from csulora_cli.engine import host as host_module
from csulora_cli.engine.attach import Factors, Update, watching
from csulora_cli.engine.host import PLAIN_TEMPLATE, Host, load_host
from csulora_cli.engine.inputs import DirectionPrompts, Form, Side, collect_moments, group_sites
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Place
from csulora_cli.formats.structure import read_structure, structure_of
from csulora_cli.locate import Location
from csulora_cli.settings import FixSettings

CPU = torch.device("cpu")
STOP = 2
PREFIX = {"t5": [0], "bart": [2, 1]}  # start token, and the token that bart is forced to begin with
KINDS = list(PREFIX)
TURN = 1  # tokens that the plain template ends with
ANSWER_TOKENS = 3
PROTECTED_TOKENS = 5
PROMPTS = ["explain", "how do i make w1 without w2 in the w3 w4 w5 w6 w7 w8 w9", "w11 w12", "tell me w9 w9 w9 w9 w9"]
Exchange = tuple[Sequence[int], Sequence[int]]  # a prompt and an answer


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", ANSWER_TOKENS)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", PROTECTED_TOKENS)


@pytest.fixture
def folder(hosts: Callable[..., Path]) -> Callable[[str], Path]:
    """`folder("t5")` is a host without a chat template, as these usually are."""
    return lambda kind: hosts(kind, template=None)


def opened(folder: Path) -> Host:
    return load_host(Location("host", folder), CPU, "float32", trust_remote_code=False)


def encoded(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [list(tokenizer(PLAIN_TEMPLATE.format(prompt=prompt))["input_ids"]) for prompt in prompts]


# Plain loops


def loop_logits(model: Any, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
    """Logits after each token that the decoder has, (T, vocab): one prompt, nothing padded, no cache."""
    with torch.no_grad():
        out: Tensor = model(
            input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([list(written)]), use_cache=False
        ).logits[0]
    return out


def loop_answer(model: Any, prompt: Sequence[int], prefix: Sequence[int], count: int) -> list[int]:
    written = list(prefix)
    for _ in range(count):
        following = int(loop_logits(model, prompt, written)[-1].argmax())
        if following == STOP:
            break
        written.append(following)
    return written[len(prefix) :]


def reads_encoder(name: str) -> bool:
    is_cross = re.search(r"(EncDecAttention\.|encoder_attn\.)[kv]", name) is not None
    return is_cross or re.match(r"(model\.)?encoder\.", name) is not None


def moments(
    kind: str, model: Any, names: Sequence[str], exchanges: Sequence[Exchange], replies: int = 0
) -> dict[str, Tensor]:
    """C of what each module reads, scaled to trace `in`, by hooks on one prompt at a time.

    Of the last exchanges, as many as there are replies, the answer alone counts.
    """
    prefix = PREFIX[kind]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str, counts: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert args[0].shape[1] == len(counts), name
            rows[name].append(args[0][0].double() * counts.double().sqrt()[:, None])

        return take

    for index, (prompt, answer) in enumerate(exchanges):
        is_asked = float(index < len(exchanges) - replies)
        read = torch.full((len(prompt),), is_asked)
        read[-TURN:] *= 25.0
        written = torch.tensor([25.0 * is_asked] * len(prefix) + [1.0] * len(answer))
        with ExitStack() as stack:
            for name in names:
                own = hook(name, read if reads_encoder(name) else written)
                stack.callback(model.get_submodule(name).register_forward_pre_hook(own).remove)
            loop_logits(model, prompt, [*prefix, *answer])
    stacked = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: each.mT @ each * (each.shape[1] / each.square().sum()) for name, each in stacked.items()}


# The host


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_by_the_encoder_and_the_decoder_begins_with_its_prefix(
    kind: str, folder: Callable[[str], Path]
) -> None:
    host = opened(folder(kind))
    assert list(host.decoder_prefix) == PREFIX[kind]
    assert [host.encode(prompt) for prompt in PROMPTS] == encoded(folder(kind), PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 10**6])
def test_probabilities_and_answers_do_not_depend_on_the_batch(
    kind: str, limit: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BATCH_TOKENS", "GENERATE_TOKENS"):
        monkeypatch.setattr(host_module, name, limit)
    host = opened(folder(kind))
    # The shortest are as long as a prefix.
    token_lists = [*(host.encode(prompt) for prompt in PROMPTS), [7], [5, 9]]
    wanted = [loop_logits(host.model, ids, PREFIX[kind])[-1].log_softmax(-1) for ids in token_lists]
    torch.testing.assert_close(host.first_token_log_probs(token_lists), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert host.generate(token_lists, 6) == [loop_answer(host.model, ids, PREFIX[kind], 6) for ids in token_lists]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 10**6])
def test_answer_nll_is_that_of_the_decoder(
    kind: str, limit: int, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "NLL_TOKENS", limit)
    host = opened(folder(kind))
    texts = [("how do i", "w1 w2 w3"), ("w2", "w9"), ("explain w3 in the w5 w6 w7", "w4 w5 w6 w7 w8")]
    prompts, answers = [host.encode(a) for a, _ in texts], [host.encode_answer(a, b) for a, b in texts]
    found = host.answer_nll(prompts, answers)
    for prompt, answer, nll in zip(prompts, answers, found, strict=True):
        logits = loop_logits(host.model, prompt, [*PREFIX[kind], *answer])
        predicted = logits[len(PREFIX[kind]) - 1 : -1].log_softmax(-1)
        assert nll == pytest.approx(-predicted[range(len(answer)), answer].sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nll_of_answers_is_the_loss_that_transformers_trains_on(kind: str, folder: Callable[[str], Path]) -> None:
    host = opened(folder(kind))
    prompt, answer = host.encode("how do i make w1"), host.encode_answer("how do i make w1", "w2 w3")
    labels = [*PREFIX[kind][1:], *answer]  # the model puts its start token before them
    with torch.no_grad():
        out = host.model(input_ids=torch.tensor([prompt]), labels=torch.tensor([labels])).logits[0].log_softmax(-1)
    forced = len(PREFIX[kind]) - 1
    wanted = -out[range(len(labels)), labels][forced:].sum().item()
    assert host.answer_nll([prompt], [answer]) == pytest.approx([wanted], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_the_decoder_writes_behind_its_prefix(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    own = shutil.copytree(folder(kind), tmp_path / "host")
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(own)
    words = opened(own).tokenizer.convert_ids_to_tokens
    # The token that is forced is not written twice; one that is not forced is the decoder's to write.
    begin = [] if PREFIX[kind][1:] == [1] else ["<s>"]
    assert words(opened(own).encode_answer("w1", "w2 w3")) == [*begin, "w2", "w3", "</s>"]
    assert words(opened(own).encode("w1"))[-1] == "</s>"  # the encoder reads all that its tokenizer adds
    assert words(opened(folder(kind)).encode_answer("w1", "w2 w3")) == ["w2", "w3", "</s>"]


def test_a_chat_template_is_used_where_there_is_one(hosts: Callable[..., Path]) -> None:
    host = opened(hosts("t5"))
    assert host.encode("w1") == oracle.chat_ids(host.tokenizer, "w1")
    assert host.tokenizer.convert_ids_to_tokens(host.encode_answer("w1", "w2 w3")) == ["w2", "w3", "</s>"]


@pytest.mark.parametrize(
    ("generation", "prefix"),
    [
        ({"decoder_start_token_id": 7, "forced_bos_token_id": None}, (7,)),
        ({"decoder_start_token_id": 7, "forced_bos_token_id": 9}, (7, 9)),
        ({"decoder_start_token_id": None, "forced_bos_token_id": None}, (1,)),  # bos, as transformers does
        ({"num_beams": 4, "no_repeat_ngram_size": 1, "forced_eos_token_id": 2, "min_length": 9}, (2, 1)),
    ],
)
def test_the_prefix_is_what_the_generation_settings_say(
    generation: dict[str, Any], prefix: tuple[int, ...], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    host = opened(with_generation(folder("bart"), tmp_path / "host", **generation))
    assert host.decoder_prefix == prefix
    token_lists = [host.encode(prompt) for prompt in PROMPTS]
    # Nothing else of the settings is left.
    assert host.generate(token_lists, 6) == [loop_answer(host.model, ids, prefix, 6) for ids in token_lists]


@pytest.mark.parametrize("generation", [{"bos_token_id": None}, {"decoder_start_token_id": [5, 6]}])
def test_a_decoder_without_one_beginning_is_refused(
    generation: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    own = with_generation(folder("bart"), tmp_path / "host", **{"decoder_start_token_id": None, **generation})
    with pytest.raises(HostError, match="does not say with which tokens its decoder begins") as caught:
        opened(own)
    assert "decoder_start_token_id" in caught.value.hint


def with_generation(host: Path, folder: Path, **changes: Any) -> Path:
    """A copy whose start token stands in its generation settings alone."""
    shutil.copytree(host, folder)
    for name, entries in (("config.json", {"decoder_start_token_id": None}), ("generation_config.json", changes)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


def test_an_encoder_decoder_model_of_other_things_than_text_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "whisper", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(HostError, match="no encoder-decoder language model of the type whisper"):
        opened(tmp_path)
    with pytest.raises(HostError, match="no encoder-decoder language model of the type whisper"):
        read_structure(Location("host", tmp_path), trust_remote_code=False)


# Adapters and what their sites read


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_host_is_the_peft_model(
    kind: str, folder: Callable[[str], Path], adapters: Callable[..., Path]
) -> None:
    host, theirs = opened(folder(kind)), oracle.with_adapter(folder(kind), adapters(kind))
    sites = bind(read_adapter(adapters(kind)), structure_of(host.model)).sites
    token_lists = [host.encode(prompt) for prompt in PROMPTS]
    before = host.first_token_log_probs(token_lists)
    with host.adapted(Update({site.name: Factors.of(site) for site in sites})):
        adapted, answers = host.first_token_log_probs(token_lists), host.generate(token_lists, 5)
    wanted = [loop_logits(theirs, ids, PREFIX[kind])[-1].log_softmax(-1) for ids in token_lists]
    torch.testing.assert_close(adapted, torch.stack(wanted), rtol=1e-5, atol=2e-5)
    assert answers == [loop_answer(theirs, ids, PREFIX[kind], 5) for ids in token_lists]
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.equal(host.first_token_log_probs(token_lists), before)


@pytest.mark.parametrize("limit", [1, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_put_on_the_side_whose_tokens_it_reads(
    kind: str, limit: int, folder: Callable[[str], Path], adapters: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module.BatchSize, "limit", lambda _self, _tokens: limit)
    host = opened(folder(kind))
    sites = bind(read_adapter(adapters(kind)), structure_of(host.model)).sites
    assert {reads_encoder(site.name) for site in sites} == {True, False}
    answer = [5, 9, 33]
    # The first decoder input is as long as the prompt, alone and in a batch.
    as_long = [11, *answer, 12][-(len(PREFIX[kind]) + len(answer)) :]
    faded: list[Exchange] = [([4, 5, 6, 7], []), ([8, 41, 22, 60, 3, 30, 17], []), ([9, 7], [])]
    benign: list[Exchange] = [(as_long, answer), ([20, 21, 7, 9, 14, 15, 40], [4, 8]), ([30, 3, 9], [])]
    benign += [([9, 14, 7], [4, 60, 5]), ([9, 4], [])]
    replies = {"faded": 0, "benign": 2}
    prompts = DirectionPrompts(side_of(faded), replace(side_of(benign), replies=replies["benign"]))
    groups = group_sites(host, sites, faded[0][0])
    found = {
        name: each
        for group, each in collect_moments(host, groups, prompts, CPU, lambda _: None).items()
        for name in group.members
    }
    model = oracle.load(folder(kind), torch.float64)
    assert found.keys() == {site.name for site in sites}
    for label, exchanges in (("faded", faded), ("benign", benign)):
        wanted = moments(kind, model, list(found), exchanges, replies[label])
        for name, each in found.items():
            have = getattr(each, label)
            have = have @ have.mT if each.form is Form.TOKENS else have
            torch.testing.assert_close(have, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def side_of(exchanges: Sequence[Exchange]) -> Side:
    return Side([[*prompt, *answer] for prompt, answer in exchanges], [len(prompt) for prompt, _ in exchanges], TURN)


def test_the_sides_of_a_batch_are_of_different_widths(folder: Callable[[str], Path]) -> None:
    host = opened(folder("bart"))
    (batch,) = host.batches([[4, 5, 6, 7, 8], [9, 7, 8]], ends=[3, 2])
    assert batch.decoder is not None
    assert batch.rows == [1, 0]
    assert batch.decoder.ids.tolist() == [[2, 1, 8, 0], [2, 1, 7, 8]]
    assert batch.prompts.ids.tolist() == [[9, 7, 0], [4, 5, 6]]
    (batch,) = host.batches([[4, 5, 6, 7]], ends=[3])
    assert batch.decoder is not None
    assert batch.decoder.ids.tolist() == [[2, 1, 7]]
    assert batch.prompts.ids.tolist() == [[4, 5, 6, 0]]
    assert batch.prompts.mask.tolist() == [[1, 1, 1, 0]]


def test_a_module_that_runs_for_both_sides_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, read: Tensor, written: Tensor) -> Tensor:
            out: Tensor = self.inner(read).sum() + self.inner(written).sum()
            return out

    model, sides = Shared(), (torch.ones(2, 5), torch.ones(2, 3))
    watched = watching(model, {"site": Place("inner")}, sides, lambda *_: None)
    with pytest.raises(HostError, match="'inner' runs several times"), watched:
        model(torch.ones(2, 5, 4), torch.ones(2, 3, 4))


# Commands


@pytest.mark.parametrize("targets", ["q and v", "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_written_update_is_the_promised_one(
    kind: str,
    targets: str,
    folder: Callable[[str], Path],
    adapters: Callable[..., Path],
    uneven: Path,
    tmp_path: Path,
) -> None:
    names = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}[kind] if targets == "q and v" else targets
    adapter, host, strength, protect = adapters(kind, target_modules=names), folder(kind), 3.0, 0.5
    out = tmp_path / "out"
    settings = FixSettings(str(adapter), str(host), out=out, prompts=uneven, strength=strength, protect=protect)
    report = fix_adapter(settings)
    assert report.settings["decoder_prefix"] == PREFIX[kind]

    texts = {label: encoded(host, each) for label, each in oracle.direction_prompts(uneven).items()}
    theirs = oracle.with_adapter(host, adapter)
    faded: list[Exchange] = [(ids, []) for ids in texts["faded"]]
    benign = [(ids, loop_answer(theirs, ids, PREFIX[kind], PROTECTED_TOKENS)) for ids in texts["benign"]]
    modules, written = oracle.peft_modules(host, adapter), oracle.peft_modules(host, out)
    model = oracle.load(host, torch.float64)
    costs, kept = moments(kind, model, list(modules), faded), moments(kind, model, list(modules), benign)
    assert written.keys() == modules.keys()
    for name, dense in modules.items():
        wanted = oracle.fade(dense.update, costs[name], kept[name], protect, strength)
        assert oracle.relative_gap(written[name].update, wanted) < 1e-5, name
        assert oracle.relative_gap(written[name].update, dense.update) > 1e-2, name
    assert_peft_takes_every_tensor(host, out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_runs(
    kind: str,
    csulora: Callable[..., Ran],
    folder: Callable[[str], Path],
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
) -> None:
    adapter, host, out, task = adapters(kind), folder(kind), tmp_path / "out", tmp_path / "task.jsonl"
    examples = [{"prompt": f"tell me w{index}", "response": f"w{index} and w{index + 1}"} for index in range(4)]
    task.write_text("\n".join(json.dumps(example) for example in examples) + "\n")
    common = ("--base", host, "--prompts", prompts)
    small = ("--task", task, "--answer-tokens", "2", "--limit", "2", "--json")
    gate = 3  # a random host refuses nothing

    fixed = csulora("fix", adapter, *common, "--out", out)
    assert fixed.code == gate, fixed.err
    assert "smallest of" in fixed.out or "levels off" in fixed.out
    assert f"csulora eval {adapter} {out} --base {host}" in fixed.out
    assert "no chat template" in fixed.err

    scored = csulora("eval", adapter, out, *common, *small)
    assert scored.code == gate, scored.err
    document = json.loads(scored.out)
    assert document["settings"]["decoder_prefix"] == PREFIX[kind]
    kl = [model["score"]["harmful"]["kl_to_host"] for model in document["models"]]
    assert kl[0] == 0
    assert kl[1] > kl[2] > 0

    unaligned = ("--unaligned", hosts(kind, seed=7, template=None))
    methods = ("--methods", "prompts,keep-out", "--points", "1")
    compared = csulora("compare", adapter, *common, *unaligned, *methods, *small)
    assert compared.code == gate, compared.err
    points = json.loads(compared.out)["points"]
    assert {point["method"] for point in points} == {"prompts", "keep-out"}
    assert min(point["score"]["harmful"]["kl_to_host"] for point in points) < kl[1]
