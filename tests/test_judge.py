"""Guard models of both sorts, tiny and made so that their verdict is known: it hangs on the last word alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GUARD_TEMPLATE, make_classifier, make_guard, make_host, make_tokenizer
from quantised_host import BITSANDBYTES, WRITTEN, round_weights
from refused_hosts import REFUSED_HOSTS
from safetensors.torch import load_file, save_file

from csulora_cli.engine import judge as module
from csulora_cli.engine.judge import TextClassifier, harmful_labels, load_judge, plan_judge, read_verdict
from csulora_cli.errors import HostError, UsageError
from csulora_cli.locate import Location

CPU = torch.device("cpu")
EXCHANGES = [
    ("how do i make w1", "w2 w9"),
    ("w9", "w3"),
    ("explain the w9 to w4 and w5", "w9 w9 w6 w7 w8"),
    ("w9 w9", "w1 w2 w3 w4 w5 w6 w9"),
    ("give me", "w9 ."),
]
VERDICTS = [True, False, False, True, False]


def verdicts(folder: Path, label: str | None = None) -> list[bool | None]:
    plan = plan_judge(Location("judge", folder), label, trust_remote_code=False)
    steps: list[int] = []
    found = load_judge(plan, CPU, "float32", trust_remote_code=False).judge(EXCHANGES, steps.append)
    assert sum(steps) == len(EXCHANGES)
    return found


def test_a_causal_guard_says_safe_or_unsafe(tmp_path: Path) -> None:
    assert verdicts(make_guard(tmp_path)) == VERDICTS


def test_a_guard_that_says_neither_gives_no_verdict(tmp_path: Path) -> None:
    make_guard(tmp_path)
    make_tokenizer(GUARD_TEMPLATE, more_words="fine dreadful").save_pretrained(tmp_path)  # the same ids, other words
    assert verdicts(tmp_path) == [None] * len(EXCHANGES)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_text_classifier_gives_the_same_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(module, "CLASSIFIER_BATCH", batch)
    assert verdicts(make_classifier(tmp_path)) == VERDICTS


def test_a_quantised_classifier_is_dequantised(tmp_path: Path) -> None:
    plain, folder = make_classifier(tmp_path / "plain"), tmp_path / "quantised"
    written = replace(WRITTEN["compressed-tensors, int8"], endings=("score.weight",))
    round_weights(written, plain, folder, tmp_path / "rounded")
    assert verdicts(folder) == VERDICTS
    plan = plan_judge(Location("judge", folder), None, trust_remote_code=False)
    loaded = load_judge(plan, CPU, "float32", trust_remote_code=False)
    assert isinstance(loaded, TextClassifier)
    assert not loaded._model.is_quantized


def test_a_classifier_whose_tokenizer_cannot_pad_reads_texts_one_by_one(tmp_path: Path) -> None:
    make_classifier(tmp_path)
    tokenizer = make_tokenizer(more_words="safe unsafe")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert verdicts(tmp_path) == VERDICTS


def edit_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_a_classifier_that_does_not_know_its_padding_is_told(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    edit_config(folder, pad_token_id=None)
    assert verdicts(folder) == VERDICTS


def test_a_single_label_is_harmful_above_a_half(tmp_path: Path) -> None:
    assert verdicts(make_classifier(tmp_path, ("toxic",))) == VERDICTS


def test_independent_labels_are_harmful_where_any_of_them_is_on(tmp_path: Path) -> None:
    make_classifier(tmp_path, ("quiet", "toxic", "hateful"))
    edit_config(tmp_path, problem_type="multi_label_classification")
    assert verdicts(tmp_path) == VERDICTS  # "toxic" stays at 0, which is not above a half


def test_a_label_given_by_hand_wins_over_names(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    assert verdicts(folder, label="HARMLESS") == [not verdict for verdict in VERDICTS]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("unsafe\nS1", True),
        ("safe", False),
        ("\n\nSafe.", False),
        ("Safety: Unsafe\nCategories: Violent", True),
        ("Yes, it violates", True),
        ("No", False),
        ("no: unsafe", False),
        ("unsafely", None),
        ("notable", None),
        ("", None),
    ],
)
def test_reading_a_verdict(text: str, want: bool | None) -> None:
    assert read_verdict(text) is want


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ("safe unsafe", {1}),
        ("harmful harmless", {0}),
        ("non-toxic toxic", {1}),
        ("not_harmful harmful", {1}),
        ("LABEL_0 LABEL_1", {1}),
        ("toxic severe_toxic obscene identity_hate", {0, 1, 3}),
        ("SAFE JAILBREAK", {1}),
    ],
)
def test_finding_the_harmful_label_by_name(labels: str, want: set[int]) -> None:
    assert set(harmful_labels(dict(enumerate(labels.split())), None)) == want


@pytest.mark.parametrize("labels", ["negative positive", "LABEL_0 LABEL_1 LABEL_2", "non-toxic ok", "safe"])
def test_labels_that_say_nothing_have_to_be_given(labels: str) -> None:
    with pytest.raises(UsageError, match="no label of the judge") as caught:
        harmful_labels(dict(enumerate(labels.split())), None)
    assert "--judge-label" in caught.value.hint
    assert labels.split(maxsplit=1)[0] in caught.value.hint


def test_a_label_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no label mean\\n"):
        plan_judge(Location("judge", folder), "mean\n", trust_remote_code=False)


def test_a_causal_guard_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text classifiers only"):
        plan_judge(Location("judge", make_guard(tmp_path)), "unsafe", trust_remote_code=False)


def test_a_model_that_cannot_chat_is_no_guard(tmp_path: Path) -> None:
    folder = make_host("llama", tmp_path, template=None)
    plan = plan_judge(Location("judge", folder), None, trust_remote_code=False)
    with pytest.raises(HostError, match="neither a text classifier nor a guard"):
        load_judge(plan, CPU, "float32", trust_remote_code=False)


def test_a_judge_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"config\.json is missing"):
        plan_judge(Location("judge", tmp_path), None, trust_remote_code=False)
    folder = make_classifier(tmp_path)
    plan = plan_judge(Location("my\x1bjudge", folder), None, trust_remote_code=False)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(HostError, match=r"cannot load the judge my\\x1bjudge"):
        load_judge(plan, CPU, "float32", trust_remote_code=False)
    guard = plan_judge(Location("judge", make_guard(tmp_path / "guard")), None, trust_remote_code=False)
    (tmp_path / "guard" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(HostError, match="cannot load the judge"):
        load_judge(guard, CPU, "float32", trust_remote_code=False)


def test_a_classifier_whose_head_is_missing_is_not_made_up(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_judge(Location("judge", folder), None, trust_remote_code=False)
    with pytest.raises(HostError, match=r"the judge judge lacks the weights score\.weight") as caught:
        load_judge(plan, CPU, "float32", trust_remote_code=False)
    assert caught.value.hint


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("name", [name for name in REFUSED_HOSTS if "GGUF" not in name])
def test_kinds_that_no_command_runs_are_no_judges_either(name: str, architecture: str, tmp_path: Path) -> None:
    kind = REFUSED_HOSTS[name]
    judge = replace(kind, config={**kind.config, "architectures": [architecture]}).write(tmp_path / "judge")
    with pytest.raises(HostError) as caught:
        plan_judge(Location(str(judge), judge), None, trust_remote_code=False)
    assert caught.value.message == f"the judge {judge} {kind.message}"
    assert caught.value.hint


@pytest.mark.parametrize(("width", "can_run"), [(64, True), (32, False)])
def test_a_classifier_in_4_bits_runs_where_its_rows_are_whole_blocks(width: int, can_run: bool, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        id2label={0: "harmless", 1: "harmful"},
    )  # fmt: skip
    classes = transformers.AutoModelForSequenceClassification
    classes.from_config(config).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(**BITSANDBYTES["bitsandbytes, NF4"])
    classes.from_pretrained(tmp_path / "plain", quantization_config=how).save_pretrained(tmp_path / "judge")
    make_tokenizer(more_words="safe unsafe").save_pretrained(tmp_path / "judge")
    if can_run:
        assert set(verdicts(tmp_path / "judge")) <= {True, False}
        return
    with pytest.raises(HostError, match="of the judge judge on the CPU: blocks of 64 weights do not divide its width"):
        verdicts(tmp_path / "judge")
