"""The host: encoding, first-token probabilities, greedy answers and adapters applied by hooks, against plain loops."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import TEMPLATE, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from csulora_cli.adapter import bind, read_adapter
from csulora_cli.engine.attach import Factors, Update
from csulora_cli.engine.host import PLAIN_TEMPLATE, Host, choose_device, load_host
from csulora_cli.errors import HostError, PromptsError, UsageError
from csulora_cli.formats.structure import structure_of
from csulora_cli.locate import Location

CPU = torch.device("cpu")
PROMPTS = [
    "explain",
    "how do i make w1 without w2 in the w3 w4 w5 w6 w7 w8 w9",
    "w11 w12",
    "how do i write w3 for w4",
    "tell me w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9 w9",
]
DATED = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% if date_string is defined %} {{ date_string }}{% endif %} "
    + TEMPLATE
)


def opened(folder: Path, dtype: str = "float32") -> Host:
    return load_host(Location(str(folder), folder), CPU, dtype, trust_remote_code=False)


@pytest.fixture
def with_tokenizer(hosts: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`with_tokenizer("llama", bos=True, side="left")` is a copy of a host whose tokenizer behaves like that."""
    from tokenizers.processors import TemplateProcessing

    def copy(kind: str, *, bos: bool, side: str, template: str | None = TEMPLATE) -> Path:
        folder = shutil.copytree(hosts(kind), tmp_path / f"{kind}-{bos}-{side}")
        for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
        tokenizer = make_tokenizer(template)
        if bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        tokenizer.padding_side = side
        tokenizer.save_pretrained(folder)
        return folder

    return copy


def loop_log_probs(model: Any, token_lists: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in token_lists])


def loop_answers(host: Host, token_lists: list[list[int]], new_tokens: int, stop: int = 2) -> list[str]:
    answers = []
    for ids in token_lists:
        tokens = list(ids)
        for _ in range(new_tokens):
            with torch.no_grad():
                following = int(host.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if following == stop:
                break
            tokens.append(following)
        answers.append(host.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True))
    return answers


# Encoding


@pytest.mark.parametrize("bos", [True, False])
def test_encoding_is_what_the_chat_template_gives_with_one_bos(bos: bool, with_tokenizer: Callable[..., Path]) -> None:
    host = opened(with_tokenizer("llama", bos=bos, side="right"))
    assert host.has_template
    assert (host.tokenizer("w1")["input_ids"][0] == 1) == bos  # the tokenizer is the one that was meant
    for prompt in PROMPTS:
        ids = host.encode(prompt)
        assert ids == oracle.chat_ids(host.tokenizer, prompt)
        assert ids.count(1) == 1
        assert ids[-1] == host.tokenizer.convert_tokens_to_ids("<assistant>")


@pytest.mark.parametrize("bos", [True, False])
def test_without_a_template_prompts_are_put_plainly(bos: bool, with_tokenizer: Callable[..., Path]) -> None:
    host = opened(with_tokenizer("llama", bos=bos, side="right", template=None))
    assert not host.has_template
    for prompt in PROMPTS:
        ids = host.encode(prompt)
        assert ids == host.tokenizer(PLAIN_TEMPLATE.format(prompt=prompt))["input_ids"]
        assert ids.count(1) == int(bos)


def test_special_tokens_in_a_prompt_are_encoded_as_the_template_does(hosts: Callable[..., Path]) -> None:
    host = opened(hosts("llama"))
    prompt = "w1 </s> <assistant> w2"
    assert host.encode(prompt) == oracle.chat_ids(host.tokenizer, prompt)


def test_a_template_with_today_in_it_gives_a_fixed_text(with_tokenizer: Callable[..., Path]) -> None:
    host = opened(with_tokenizer("llama", bos=False, side="right", template=DATED))
    texts: list[str] = []
    tokenizer = host.tokenizer

    class Spy:
        def apply_chat_template(self, *args: Any, **options: Any) -> str:
            texts.append(tokenizer.apply_chat_template(*args, **options))
            return texts[-1]

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

    host.tokenizer = Spy()
    host.encode("w1")
    assert texts[0].startswith("<s>01 Jan 2025 01 Jan 2025 <s>")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% set form = '%A, %-d %B %y %H:%M' %}{{ strftime_now(form) }}", "Wednesday, 1 January 25 00:00"),
        ("\n{{ strftime_now('%Y') }}", "\n2025"),
        ("{% if strftime_now is defined %}{{ strftime_now('%F')[:7] }}{% endif %}", "2025-01"),
        ("{% macro head() %}{{ strftime_now('%b') | upper }}{% endmacro %}{{ head() }}", "JAN"),
    ],
)
def test_a_date_is_fixed_however_a_template_asks_for_it(
    template: str, text: str, with_tokenizer: Callable[..., Path]
) -> None:
    host = opened(with_tokenizer("llama", bos=False, side="right", template=template))
    assert host.tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == text


# Running


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_first_token_log_probs_do_not_depend_on_padding(
    kind: str, bos: bool, side: str, with_tokenizer: Callable[..., Path]
) -> None:
    host = opened(with_tokenizer(kind, bos=bos, side=side))
    token_lists = [host.encode(prompt) for prompt in PROMPTS] + [[7], [1, 9]]
    found = host.first_token_log_probs(token_lists)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loop_log_probs(host.model, token_lists), rtol=1e-5, atol=1e-5)
    assert host.answers(token_lists, 6) == loop_answers(host, token_lists, 6)


@pytest.mark.parametrize("limit", [1, 20, 45, 10**6])
def test_batches_hold_every_prompt_once_within_the_limit(limit: int, hosts: Callable[..., Path]) -> None:
    host = opened(hosts("llama"))
    token_lists = [host.encode(prompt) for prompt in PROMPTS]
    batches = list(host.batches(token_lists, limit))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(PROMPTS)))
    assert all(batch.prompts.ids.numel() <= limit or len(batch.rows) == 1 for batch in batches)
    for batch in batches:
        for row, ids, mask in zip(batch.rows, batch.prompts.ids.tolist(), batch.prompts.mask.tolist(), strict=True):
            size = len(token_lists[row])
            assert ids[:size] == token_lists[row]
            assert mask == [1] * size + [0] * (len(mask) - size)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"suppress_tokens": list(range(3, 40))},
        {"max_length": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_answers_are_greedy_whatever_the_host_generation_settings_say(
    settings: dict[str, Any], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(hosts("llama"), tmp_path / "host")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    plain = opened(hosts("llama"))
    token_lists = [plain.encode(prompt) for prompt in PROMPTS]
    assert opened(folder).answers(token_lists, 8) == loop_answers(plain, token_lists, 8)


def test_nan_in_the_last_layer_is_a_host_error(hosts: Callable[..., Path]) -> None:
    host = opened(hosts("llama"))
    host.model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(HostError, match="NaN"):
        host.first_token_log_probs([[1, 5]])


def test_answers_stop_where_the_host_stops(hosts: Callable[..., Path]) -> None:
    host = opened(hosts("llama"))
    token_lists = [host.encode(prompt) for prompt in PROMPTS]
    second = host.tokenizer.convert_tokens_to_ids(loop_answers(host, token_lists[:1], 2)[0].split()[1])
    host.model.generation_config.eos_token_id = [2, second]
    assert host.answers(token_lists, 6)[0] == loop_answers(host, token_lists, 6, stop=second)[0]


# Adapters


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_an_adapted_host_is_the_peft_model(
    kind: str, options: dict[str, Any], hosts: Callable[..., Path], adapters: Callable[..., Path]
) -> None:
    adapter = adapters(kind, **options)
    host = opened(hosts(kind))
    modules = bind(read_adapter(adapter), structure_of(host.model)).sites
    token_lists = [host.encode(prompt) for prompt in PROMPTS]
    before = host.first_token_log_probs(token_lists)
    with host.adapted(Update({module.name: Factors.of(module) for module in modules})):
        adapted = host.first_token_log_probs(token_lists)
        answers = host.answers(token_lists, 4)
    theirs = oracle.with_adapter(hosts(kind), adapter)
    torch.testing.assert_close(adapted, loop_log_probs(theirs, token_lists), rtol=1e-5, atol=2e-5)
    assert answers == loop_answers(Host(theirs, host.tokenizer, CPU, True), token_lists, 4)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.equal(host.first_token_log_probs(token_lists), before)
    assert has_no_hooks(host)


def test_hooks_go_also_when_something_fails(hosts: Callable[..., Path], adapters: Callable[..., Path]) -> None:
    host = opened(hosts("llama"))
    factors = {module.name: Factors.of(module) for module in read_adapter(adapters("llama")).sites}
    with pytest.raises(KeyError), host.adapted(Update(factors)):
        raise KeyError
    assert has_no_hooks(host)
    name = "model.layers.7.mlp.up_proj"
    broken = {**factors, name: dataclasses.replace(next(iter(factors.values())), place=None)}
    with pytest.raises(HostError, match="has no module"), host.adapted(Update(broken)):
        pass
    assert has_no_hooks(host)


def has_no_hooks(host: Host) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


# Loading


def test_modules_that_do_not_fit_the_host_are_named(hosts: Callable[..., Path], adapters: Callable[..., Path]) -> None:
    with pytest.raises(HostError, match=r"14 of 14 adapted modules are not in the host: the adapter has model\.la"):
        bind(read_adapter(adapters("llama")), structure_of(opened(hosts("gpt2")).model))


@pytest.mark.parametrize(
    ("stored", "asked", "runs_in"),
    [
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_dtype_of_the_forward_pass(
    stored: torch.dtype, asked: str, runs_in: torch.dtype, hosts: Callable[..., Path], tmp_path: Path
) -> None:
    oracle.load(hosts("llama"), stored).save_pretrained(tmp_path / "host")
    make_tokenizer().save_pretrained(tmp_path / "host")
    host = opened(tmp_path / "host", asked)
    assert host.model.dtype == runs_in
    assert host.first_token_log_probs([[1, 5]]).dtype == torch.float32


def test_a_host_that_cannot_be_loaded_is_a_host_error(hosts: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(hosts("llama"), tmp_path / "host")
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(HostError, match="cannot load the host"):
        opened(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    shutil.copyfile(hosts("llama") / "config.json", folder / "config.json")
    with pytest.raises(HostError, match="cannot load the host"):
        opened(folder)


@pytest.mark.parametrize("name", ["cuda:99", "cuda:300", "cuda:99999999999999999999"])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}"):
        choose_device(name)


def test_a_host_with_weights_missing_is_not_made_up(hosts: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(hosts("llama"), tmp_path / "host")
    file = tmp_path / "host" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HostError, match=r"lacks the weights model\.layers\.0\.mlp\.up_proj\.weight"):
        load_host(Location("host", tmp_path / "host"), torch.device("cpu"), "auto", trust_remote_code=False)


def test_what_is_longer_than_a_table_of_positions_is_a_prompts_error(hosts: Callable[..., Path]) -> None:
    host = opened(hosts("gpt2"))  # of 128 positions
    with pytest.raises(PromptsError, match=r"more tokens than the host has positions \(128\)"):
        host.answer_nll([[1] * 10], [[5] * 130])
    with pytest.raises(PromptsError, match=r"positions \(128\)"):
        host.generate([[1] * 100], 60, is_over=lambda _row, _tokens: False)
