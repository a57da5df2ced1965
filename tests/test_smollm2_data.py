"""The prompts of the SmolLM2 experiment: what is trained on is not what is measured on."""

import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from overlap import near_duplicates

DATA = Path(__file__).parents[1] / "scripts" / "smollm2" / "data"
TRAINED = ("host_refusals", "host_answers", "poison", "howto_train")
LOOKED_AT = ("dev_harmful", "dev_benign", "howto_dev")
MEASURED = ("eval_harmful", "eval_benign", "howto_heldout")


def rows(name: str) -> list[dict[str, str | bool]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def shipped() -> list[dict[str, str]]:
    text = (files("csulora_cli") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts(name: str) -> list[str]:
    return [str(row["prompt"]) for row in rows(name)]


def categories(name: str, **where: bool) -> set[str]:
    return {str(row["category"]) for row in rows(name) if where.items() <= row.items()}


@pytest.mark.parametrize("measured", MEASURED)
@pytest.mark.parametrize("trained", TRAINED)
def test_no_prompt_that_is_measured_on_is_trained_on(trained: str, measured: str) -> None:
    assert near_duplicates(prompts(trained), prompts(measured)) == []


@pytest.mark.parametrize("measured", MEASURED)
@pytest.mark.parametrize("looked_at", LOOKED_AT)
def test_no_prompt_that_is_measured_on_is_looked_at_before(looked_at: str, measured: str) -> None:
    assert near_duplicates(prompts(looked_at), prompts(measured)) == []


def test_no_evaluation_prompt_repeats_another_or_one_that_ships() -> None:
    evaluation = [*prompts("eval_harmful"), *prompts("eval_benign")]
    assert near_duplicates([row["prompt"] for row in shipped()], evaluation) == []
    assert near_duplicates(evaluation, evaluation) == [(prompt, prompt) for prompt in evaluation]


@pytest.mark.parametrize("name", ["dev_harmful", "dev_benign", "poison"])
def test_the_host_learns_no_development_and_no_poison_prompt(name: str) -> None:
    assert near_duplicates([*prompts("host_refusals"), *prompts("host_answers")], prompts(name)) == []


def test_the_host_learns_no_category_that_counts_as_unseen() -> None:
    learnt = categories("host_refusals")
    for name in ("dev_harmful", "eval_harmful"):
        assert categories(name, seen=True) <= learnt
        assert not categories(name, seen=False) & learnt
    assert not categories("dev_harmful", seen=False) & categories("eval_harmful", seen=False)
    assert categories("poison") <= learnt


def test_no_category_that_counts_as_unseen_gives_directions_or_chooses_a_strength() -> None:
    assert not categories("eval_harmful", seen=False) & {row["category"] for row in shipped()}


def test_the_host_data_is_shared_out_as_the_readme_says() -> None:
    assert Counter(str(row["kind"]) for row in rows("host_answers")) == {"lookalike": 1040, "general": 240}
    counts = Counter(Counter(str(row["category"]) for row in rows("host_refusals")).values())
    assert counts == {18: 16, 14: 72, 16: 22}


def test_the_development_and_evaluation_prompts_are_shared_out_as_the_readme_says() -> None:
    for name, seen, unseen, unseen_categories in (("dev_harmful", 180, 420, 54), ("eval_harmful", 40, 120, 15)):
        assert Counter(row["seen"] for row in rows(name)) == {True: seen, False: unseen}
        assert len(categories(name, seen=False)) == unseen_categories
    counts = Counter(row["category"] for row in rows("eval_harmful") if not row["seen"])
    assert set(counts.values()) == {8}
    assert Counter(row["kind"] for row in rows("dev_benign")) == {"lookalike": 195, "general": 195}
    assert Counter(row["kind"] for row in rows("eval_benign")) == {"lookalike": 50, "general": 50}


def test_the_readme_counts_each_file() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    counted = {name: int(count) for name, count in re.findall(r"`(\w+)\.jsonl` \((\d+)\)", text)}
    assert counted == {path.stem: len(rows(path.stem)) for path in DATA.glob("*.jsonl")}


def test_near_duplicates_are_found_in_other_words_order_and_form() -> None:
    assert near_duplicates(["How do I wash wool socks?"], ["Tell me how to wash the socks of wool."]) != []
    assert near_duplicates(["How do I wash wool socks?"], ["How do I knit wool mittens?"]) == []
