"""The built-in prompts, and prompt files of users."""

import hashlib
import json
import os
from collections import Counter
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import tell_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap import near_duplicates

from csulora_cli.errors import PromptsError
from csulora_cli.promptset import MIN_PER_SPLIT, SPLITS, Prompts, PromptSet, _deal, _Line, load_prompts

QUICK = settings(max_examples=50, deadline=None)
EXPERIMENT = Path(__file__).parents[1] / "scripts" / "smollm2" / "data"


def lines(per_label: int = 16, **extra: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{label} {index}", "label": label, **extra}
        for index in range(per_label)
        for label in ("harmful", "benign")
    ]


def write(tmp_path: Path, rows: list[Any]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def refused(tmp_path: Path, rows: list[Any]) -> str:
    with pytest.raises(PromptsError) as caught:
        load_prompts(write(tmp_path, rows))
    assert_well_formed(caught.value)
    return caught.value.message


def assert_well_formed(error: PromptsError) -> None:
    assert error.exit_code == 4
    assert "\n" not in error.message + error.hint
    assert "\x1b" not in error.message + error.hint


def split(found: PromptSet, name: str) -> Prompts:
    prompts = getattr(found, name)
    assert isinstance(prompts, Prompts)
    return prompts


def everything(found: PromptSet, *names: str) -> list[str]:
    return [prompt for name in names or SPLITS for prompt in (*split(found, name).harmful, *split(found, name).benign)]


def built_in_rows() -> list[dict[str, str]]:
    text = (files("csulora_cli") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# The set that ships


def test_the_built_in_set_is_broad() -> None:
    found = load_prompts()
    assert found.name == "built-in"
    assert sum(len(split(found, name).harmful) for name in SPLITS) >= 128
    assert sum(len(split(found, name).lookalikes) for name in SPLITS) >= 128
    assert all(len(split(found, name).general) >= 32 for name in SPLITS)


def test_every_category_of_the_built_in_set_is_harm_beside_look_alikes_or_everyday_requests() -> None:
    rows = built_in_rows()
    counts = Counter((row["category"], row.get("kind", row["label"])) for row in rows)
    harm = {row["category"] for row in rows if row["label"] == "harmful"}
    everyday = {row["category"] for row in rows if row.get("kind") == "general"}
    assert len(harm) >= 16
    assert all(counts[name, "harmful"] == counts[name, "lookalike"] >= 8 for name in harm)
    assert all(counts[name, "general"] >= 8 for name in everyday)
    assert not harm & everyday
    assert harm | everyday == {row["category"] for row in rows}


def test_the_built_in_splits_share_no_category_and_no_prompt() -> None:
    found = load_prompts()
    categories = [name for split_name in SPLITS for name in found.categories[split_name]]
    assert len(categories) == len(set(categories))
    assert all(found.categories[name] for name in SPLITS)
    prompts = [" ".join(prompt.casefold().split()) for prompt in everything(found)]
    assert len(prompts) == len(set(prompts))


def test_the_built_in_splits_share_no_near_duplicate() -> None:
    found = load_prompts()
    for one, other in combinations(SPLITS, 2):
        assert near_duplicates(everything(found, one), everything(found, other)) == []


def test_no_everyday_request_of_any_split_stands_in_the_experiment() -> None:
    found = load_prompts()
    everyday = [prompt for split in SPLITS for prompt in getattr(found, split).general]
    experiment = [
        json.loads(line)["prompt"]
        for path in sorted(EXPERIMENT.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(experiment) > 1000
    assert near_duplicates(everyday, experiment) == []


def test_the_built_in_prompts_are_clean_text_and_each_benign_one_has_a_kind() -> None:
    for row in built_in_rows():
        keys = {"prompt", "label", "category", "split"}
        assert set(row) == (keys | {"kind"} if row["label"] == "benign" else keys)
        assert row["prompt"] == row["prompt"].strip()
        assert row["prompt"].isprintable()


# Files of users


def test_a_file_with_prompts_and_labels_only(tmp_path: Path) -> None:
    path = write(tmp_path, lines())
    found = load_prompts(path)
    assert (found.name, found.sha256) == ("prompts.jsonl", hashlib.sha256(path.read_bytes()).hexdigest())
    assert [len(split(found, name).harmful) for name in SPLITS] == [8, 4, 4]
    assert [len(split(found, name).benign) for name in SPLITS] == [8, 4, 4]
    assert sorted(everything(found)) == sorted(row["prompt"] for row in lines())
    assert found.categories == {name: [] for name in SPLITS}


def test_a_file_with_splits_is_taken_at_its_word(tmp_path: Path) -> None:
    rows = [{**row, "split": SPLITS[index // 2 % 3]} for index, row in enumerate(lines(12))]
    found = load_prompts(write(tmp_path, rows))
    for name in SPLITS:
        want = [row["prompt"] for row in rows if row["split"] == name and row["label"] == "harmful"]
        assert list(split(found, name).harmful) == want


def test_benign_prompts_are_look_alikes_unless_they_say_otherwise(tmp_path: Path) -> None:
    kinds = ["general", "lookalike", None]
    rows = [
        {"prompt": f"{name} {label} {index}", "label": label, "split": name}
        | ({"kind": kinds[index % 3]} if label == "benign" else {})
        for index in range(6)
        for label in ("harmful", "benign")
        for name in SPLITS
    ]
    found = load_prompts(write(tmp_path, rows))
    for name in SPLITS:
        prompts = split(found, name)
        assert prompts.harmful == tuple(f"{name} harmful {index}" for index in range(6))
        assert prompts.lookalikes == tuple(f"{name} benign {index}" for index in (1, 2, 4, 5))
        assert prompts.general == tuple(f"{name} benign {index}" for index in (0, 3))
        assert prompts.benign == prompts.lookalikes + prompts.general


def test_a_file_that_alternates_kinds_has_both_in_every_split(tmp_path: Path) -> None:
    rows = lines()
    tell_kinds(rows)
    found = load_prompts(write(tmp_path, rows))
    assert [len(split(found, name).lookalikes) for name in SPLITS] == [4, 2, 2]
    assert [len(split(found, name).general) for name in SPLITS] == [4, 2, 2]


def test_whole_categories_are_dealt_out(tmp_path: Path) -> None:
    rows = [{**row, "category": f"c{index // 2 % 8}"} for index, row in enumerate(lines(32))]
    found = load_prompts(write(tmp_path, rows))
    assert found.categories == {"directions": ["c0", "c1", "c4", "c5"], "tuning": ["c2", "c6"], "report": ["c3", "c7"]}
    where = {prompt: name for name in SPLITS for prompt in (*split(found, name).harmful, *split(found, name).benign)}
    assert all(row["category"] in found.categories[where[row["prompt"]]] for row in rows)


@pytest.mark.parametrize("missing", ["category", "label"])
def test_prompts_are_dealt_where_categories_cannot_be(tmp_path: Path, missing: str) -> None:
    rows = [{**row, "category": f"c{index // 2 % 5}"} for index, row in enumerate(lines(32))]
    if missing == "category":
        del rows[0]["category"]
    else:
        rows += [{"prompt": f"everyday {index}", "label": "benign", "category": f"a{index % 4}"} for index in range(8)]
    found = load_prompts(write(tmp_path, rows))
    assert len(everything(found)) == len(rows)
    assert set(found.categories["directions"]) & set(found.categories["report"])


def test_too_few_categories_to_deal_out_deals_prompts(tmp_path: Path) -> None:
    rows = [{**row, "category": f"c{index // 2 % 3}"} for index, row in enumerate(lines())]
    assert len(load_prompts(write(tmp_path, rows)).directions.harmful) == 8


def test_splits_on_some_lines_only_are_refused(tmp_path: Path) -> None:
    # Dealing all of them out anew would put the user's report prompts into directions without a word.
    rows = [{**row, "split": SPLITS[index // 2 % 3]} for index, row in enumerate(lines())]
    del rows[5]["split"]
    assert "split" in refused(tmp_path, rows)


def test_blank_lines_bom_crlf_and_spaces_are_fine(tmp_path: Path) -> None:
    rows = [json.dumps({**row, "prompt": f"  {row['prompt']} \t"}) for row in lines()]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n  \r\n".join(rows).encode())
    assert sorted(everything(load_prompts(path))) == sorted(row["prompt"] for row in lines())


def test_line_separators_inside_a_prompt_do_not_end_its_line(tmp_path: Path) -> None:
    rows = [*lines(), {"prompt": "one\u2028two\u0085three", "label": "benign"}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert "one\u2028two\u0085three" in everything(load_prompts(path))


def test_unknown_keys_of_a_line_are_ignored(tmp_path: Path) -> None:
    assert len(everything(load_prompts(write(tmp_path, lines(source="x", id=3))))) == 32


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ("plain text", "not a JSON object"),
        ("[" * 10**5, "not a JSON object"),
        ('{"prompt": ' + "9" * 5000 + "}", "not a JSON object"),
        ({"label": "benign"}, "no prompt text"),
        ({"prompt": "", "label": "benign"}, "no prompt text"),
        ({"prompt": " \n", "label": "benign"}, "no prompt text"),
        ({"prompt": 3, "label": "benign"}, "no prompt text"),
        ({"prompt": ["x"], "label": "benign"}, "no prompt text"),
        ({"prompt": "x"}, "label is None"),
        ({"prompt": "x", "label": "Harmful"}, "label is Harmful"),
        ({"prompt": "x", "label": ["harmful"]}, "label is"),
        ({"prompt": "x", "label": "a\n\x1b[31m"}, "label is a\\n\\x1b[31m"),
        ({"prompt": "x", "label": "benign", "split": "train"}, "split is train"),
        ({"prompt": "x", "label": "benign", "split": 1}, "split is 1"),
        ({"prompt": "x", "label": "benign", "split": ""}, "split is"),
        ({"prompt": "x", "label": "benign", "category": 3}, "category is not text"),
        ({"prompt": "x", "label": "benign", "category": ["a"]}, "category is not text"),
        ({"prompt": "x", "label": "benign", "kind": "everyday"}, "kind is everyday"),
        ({"prompt": "x", "label": "benign", "kind": ["general"]}, "kind is"),
        ({"prompt": "x", "label": "benign", "kind": "a\n\x1b[31m"}, "kind is a\\n\\x1b[31m"),
        ({"prompt": "x", "label": "harmful", "kind": "lookalike"}, "only benign prompts"),
        ({"prompt": "harmful 0", "label": "harmful"}, "the same prompt as in line 1"),
        ({"prompt": " benign 0 ", "label": "harmful"}, "the same prompt as in line 2"),
        ('{"prompt": "half a \\ud800 surrogate", "label": "benign"}', "line 33"),  # no tokenizer can encode it
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    message = refused(tmp_path, [*lines(), row])
    assert complaint in message
    assert "line 33" in message


@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_too_few_prompts_of_a_label_are_refused(tmp_path: Path, label: str) -> None:
    rows = [row for row in lines() if row["label"] != label or int(row["prompt"].split()[1]) < 4 * MIN_PER_SPLIT - 1]
    assert f"3 {label} prompts for report" in refused(tmp_path, rows)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "0 harmful prompts" in refused(tmp_path, [])


def test_a_split_without_prompts_is_refused(tmp_path: Path) -> None:
    assert "0 harmful prompts for tuning" in refused(tmp_path, lines(split="directions"))


@pytest.mark.timeout(30)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe")
    for name, complaint in (("missing\n", "missing\\n is missing"), ("latin", "not UTF-8"), ("pipe", "regular file")):
        with pytest.raises(PromptsError) as caught:
            load_prompts(tmp_path / name)
        assert complaint in caught.value.message
        assert_well_formed(caught.value)


def test_a_file_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csulora_cli.promptset.MAX_BYTES", 2**20)
    assert "larger than 1 MiB" in refused(tmp_path, ["x" * 2**20])


CATEGORIES = st.none() | st.sampled_from([f"c{index}" for index in range(6)])


@QUICK
@given(st.lists(st.tuples(st.sampled_from(["harmful", "benign"]), CATEGORIES), max_size=60))
def test_dealing_puts_each_prompt_into_one_split(kinds: list[tuple[str, str | None]]) -> None:
    rows = [_Line(index, f"p{index}", label, category, None, None) for index, (label, category) in enumerate(kinds)]
    split_of = _deal(rows, "prompts.jsonl")
    assert set(split_of) == {row.prompt for row in rows}
    assert set(split_of.values()) <= set(SPLITS)


@QUICK
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=4, max_size=9), st.randoms())
def test_dealing_never_tears_a_category(counts: list[tuple[int, int]], random: Random) -> None:
    kinds = [
        (label, f"c{name}")
        for name, of_labels in enumerate(counts)
        for label, count in zip(("harmful", "benign"), of_labels, strict=True)
        for _ in range(count)
    ]
    random.shuffle(kinds)
    rows = [_Line(index, f"p{index}", label, category, None, None) for index, (label, category) in enumerate(kinds)]
    split_of = _deal(rows, "prompts.jsonl")
    for name in {category for _, category in kinds}:
        assert len({split_of[row.prompt] for row in rows if row.category == name}) == 1
    assert set(split_of.values()) == set(SPLITS)


def test_general_prompts_are_protected_and_all_benign_ones_where_there_are_none() -> None:
    assert Prompts(("h",), ("l",), ("g",)).protected == ("g",)
    assert Prompts(("h",), ("l",), ()).protected == ("l",)


def test_look_alikes_fade_unless_they_are_what_is_protected_and_harmful_prompts_where_these_are_few() -> None:
    assert Prompts(("h", "i"), ("l",), ("g",)).faded == ("l",)
    assert Prompts(("h", "i", "j"), ("l",), ("g",)).faded == ("h", "i", "j", "l")
    assert Prompts(("h",), (), ("g",)).faded == ("h",)
    assert Prompts(("h",), ("l",), ()).faded == ("h",)
