"""What is put into a journal comes back, also after its writer was stopped."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from csulora_cli.compare_report import Origin, Point
from csulora_cli.journal import Journal, from_plain
from csulora_cli.refusals import RefusalTest
from csulora_cli.report import PathRecord, StrengthRecord
from csulora_cli.scores import AnswerCounts, KindScore, ModelScore, Retention, RetentionKind, TaskScore
from csulora_cli.stats import Count

FOUND = StrengthRecord(
    2.83, True, True, 0.06, 16.25, (PathRecord(2.0, 0.1, None, 1e-3), PathRecord(2.83, 0.05, 3.0, 0.2))
)


def point() -> Point:
    counts = {test: AnswerCounts(Count.of(1, 3), Count.of(2, 3), Count.of(0, 3)) for test in RefusalTest}
    kind = KindScore(counts, 0.1, 1 / 3)
    score = ModelScore(kind, kind, kind, TaskScore(Count.of(1, 2), 0.7, 0.5, None), Retention(0.5, RetentionKind.NLL))
    return Point("prompts", "csulora", 2.83, Origin.AUTO, 0.25, 16, score, (True, False))


@pytest.mark.parametrize("record", [FOUND, StrengthRecord(1.0, False), point()])
def test_what_was_put_comes_back_the_same(record: Point | StrengthRecord, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path).put(record, "run", "prompts", 0.1)
    found = Journal(path).get(type(record), "run", "prompts", 0.1)
    assert found == record
    assert Journal(path).get(type(record), "other run", "prompts", 0.1) is None
    assert Journal(path).get(type(record), "run", "prompts", 0.2) is None


def test_enumerations_and_tuples_come_back_as_such() -> None:
    found = from_plain(Point, json.loads(json.dumps(asdict(point()))))
    assert found.origin is Origin.AUTO
    assert next(iter(found.score.harmful.answers)) is RefusalTest.STRICT
    assert isinstance(found.task_right, tuple)


def test_without_a_file_it_lasts_as_long_as_the_journal() -> None:
    journal = Journal(None)
    journal.put(FOUND, "run")
    assert journal.get(StrengthRecord, "run") == FOUND
    assert Journal(None).get(StrengthRecord, "run") is None


def test_a_line_that_was_cut_off_is_lost_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.put(FOUND, "first")
    journal.put(point(), "second")
    path.write_bytes(path.read_bytes()[:-20])
    journal = Journal(path)
    assert journal.get(StrengthRecord, "first") == FOUND
    assert journal.get(Point, "second") is None
    journal.put(point(), "third")
    journal = Journal(path)
    assert journal.get(StrengthRecord, "first") == FOUND
    assert journal.get(Point, "third") == point()
