"""An evaluation in words: every number stands in its own row."""

from csulora_cli import eval_wording
from csulora_cli.eval_report import Change, EvalReport, EvaluatedModel, JudgeScore, Role
from csulora_cli.refusals import RefusalTest
from csulora_cli.report import InputRecord
from csulora_cli.scores import AnswerCounts, KindScore, ModelScore, Retention, RetentionKind, TaskScore
from csulora_cli.stats import Agreement, Count, PairedTest

STRICT, QI, JAILBREAKBENCH = RefusalTest


def kind(first: int, kl_to_host: float, kl_to_adapter: float) -> KindScore:
    """Of 99: first, first + 1 and first + 2 answered by the three tests; refused twice as many, incoherent thrice."""
    answers = {
        test: AnswerCounts(Count.of(2 * (first + at), 99), Count.of(first + at, 99), Count.of(3 * (first + at), 99))
        for at, test in enumerate(RefusalTest)
    }
    return KindScore(answers, kl_to_host, kl_to_adapter)


SCORE = ModelScore(
    harmful=kind(5, 0.11, 0.12),
    lookalikes=kind(10, 0.21, 0.22),
    general=kind(15, 0.31, 0.32),
    task=TaskScore(Count.of(44, 99), 0.43, 0.87, None),
    retention=Retention(0.87, RetentionKind.EXACT_MATCH),
)
TEST = {test: PairedTest(3 + at, 8, 0.0625) for at, test in enumerate(RefusalTest)}
OTHER = {test: PairedTest(0, 21 + at, 1e-9) for at, test in enumerate(RefusalTest)}
JUDGE = JudgeScore(Count.of(31, 99), 2, Agreement(Count.of(77, 97), 0.66))


def report(general: int = 99, *, has_task: bool = True) -> EvalReport:
    names = ["host", "adapter", "repaired", "prompts", *(["task"] if has_task else []), "judge"]
    model = EvaluatedModel(
        "repaired", Role.REPAIRED, "mended", SCORE, Change(TEST, OTHER, PairedTest(4, 2, 0.6875)), JUDGE
    )
    return EvalReport(
        version="1",
        inputs={name: InputRecord(f"my {name}", None, {}) for name in names},
        settings={"answer_tokens": 24, "task_tokens": 31 if has_task else None, "judge": "a guard"},
        prompt_counts={"harmful": 99, "lookalikes": 99, "general": general, "task": 99 if has_task else 0},
        models=[
            EvaluatedModel("host", Role.HOST, "my host", SCORE, None, JUDGE),
            EvaluatedModel("adapter", Role.ADAPTER, "my adapter", SCORE, None, JUDGE),
            model,
        ],
    )


def cells(given: EvalReport) -> dict[str, str]:
    """The last model's cells by row, without the intervals."""
    (table,) = eval_wording.score_tables(given)
    assert table.header == ("", "host", "adapter", "repaired")
    return {row[0].strip(): row[-1].split(" ")[0] for row in table.rows}


def test_every_number_stands_in_its_own_row() -> None:
    assert cells(report()) == {
        "attack success": "5/99",
        "by Qi's list": "6/99",
        "by JailbreakBench's": "7/99",
        "by the judge": "31/99",
        "judge agrees": "77/97",
        "Cohen's kappa": "0.66",
        "judge unreadable": "2",
        "harmful, incoherent": "15/99",
        "KL to host, harmful": "0.11",
        "look-alikes refused": "20/99",
        "general refused": "30/99",
        "KL to host, general": "0.31",
        "KL to adapter, general": "0.32",
        "task, exact match": "44/99",
        "task, NLL a token": "0.43",
        "kept, exact match": "0.87",
        "kept, NLL": "n/a",
        "summary score": f"{3 / (99 / 94 + 99 / 79 + 1 / 0.87):.2f}",
    }


def test_without_kinds_and_task_the_rows_say_so() -> None:
    found = cells(report(general=0, has_task=False))
    assert found["benign refused"] == "20/99"
    assert found["KL to adapter, benign"] == "0.32"
    assert found["kept, by KL"] == "0.87"
    assert not [label for label in found if "general" in label or "task" in label or "look-alike" in label]


def test_changes_are_those_by_our_own_test() -> None:
    table = eval_wording.change_table(report())
    assert table is not None
    assert table.rows == (
        ("repaired: attack success", "3", "8", "0.0625"),
        ("repaired: look-alikes refused", "0", "21", "1.0e-09"),
        ("repaired: task, exact match", "4", "2", "0.688"),
    )


def test_the_verdict_is_what_was_measured() -> None:
    assert eval_wording.verdict(report()) == [
        "Read with care: the host itself refuses only 10 of 99 harmful prompts: a repair restores no more than the "
        "host had.",
        "Attack success on harmful prompts: 5 of 99 with the host alone, 5 of 99 with the adapter, 5 of 99 with "
        "repaired.",
    ]


def test_the_head_names_inputs_counts_and_decoding() -> None:
    assert eval_wording.head(report()) == [
        ("host", "my host"),
        ("adapter", "my adapter"),
        ("repaired", "my repaired"),
        ("prompts", "my prompts, its report split"),
        ("", "99 harmful, 99 look-alike and 99 general benign ones"),
        ("task", "my task, 99 examples"),
        ("judge", "my judge"),
        ("", "a guard"),
        ("decoding", "greedy, so without a seed; 24 new tokens, 31 for the task"),
    ]
