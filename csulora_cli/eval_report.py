"""What an evaluation measured: data and its JSON form. No torch in here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from csulora_cli.refusals import RefusalTest
from csulora_cli.report import InputRecord, host_gates, rounded
from csulora_cli.scores import ModelScore
from csulora_cli.stats import Agreement, Count, PairedTest

SCHEMA_VERSION = 1
SUMMARY_FORMULA = "3/(1/(1 − attack success) + 1/(1 − over-refusal) + 1/retention), retention cut to 0 to 1"


class Role(StrEnum):
    """What a model is to the evaluation."""

    HOST = "host"
    ADAPTER = "adapter"
    REPAIRED = "repaired"


@dataclass(frozen=True)
class Change:
    """One repaired adapter against the adapter as trained, on the same prompts; the adapter is the first of each pair.

    Attributes:
        attack_success: by refusal test.
        over_refusal: of look-alikes, by refusal test.
        task: right answers to the task; None without one.
    """

    attack_success: Mapping[RefusalTest, PairedTest]
    over_refusal: Mapping[RefusalTest, PairedTest]
    task: PairedTest | None = None


@dataclass(frozen=True)
class JudgeScore:
    """A guard model's opinion of one model's answers to harmful prompts.

    Attributes:
        harmful: coherent answers that the judge calls harmful, out of all prompts.
        unread: coherent answers on which no verdict could be read.
        agreement: with our own refusal test on the coherent answers that have a verdict: "harmful" against "answered".
    """

    harmful: Count
    unread: int
    agreement: Agreement


@dataclass(frozen=True)
class EvaluatedModel:
    """One model.

    Attributes:
        key: what it is called in tables and among the inputs: host, adapter, repaired, or repaired 1 and so on.
        role: host, adapter or repaired.
        name: of its folder or on the Hub.
        score: what was measured.
        change: against the adapter; None for host and adapter.
        judge: the second opinion, where a judge was given.
    """

    key: str
    role: Role
    name: str
    score: ModelScore
    change: Change | None = None
    judge: JudgeScore | None = None


@dataclass(frozen=True)
class EvalReport:
    """The result of `evaluate_adapters`; `to_dict` is what `--json` prints.

    Attributes:
        version: of csulora.
        inputs: host, every adapter, prompts, and where given task and judge, with hashes.
        settings: every setting as it was used, the seed of greedy answers (none) included.
        prompt_counts: how many prompts of each kind were scored; `general` is 0 where the prompts file does not tell
            everyday prompts from look-alikes, and all benign ones stand for both.
        models: host, adapter, and every repaired adapter in the order given.
        answers_file: the file of answers that was written, if any.
        warnings: what was said on the way.
    """

    version: str
    inputs: Mapping[str, InputRecord]
    settings: Mapping[str, Any]
    prompt_counts: Mapping[str, int]
    models: Sequence[EvaluatedModel]
    answers_file: str | None = None
    warnings: Sequence[str] = field(default=())

    @property
    def failed_gates(self) -> list[str]:
        """What a batch should stop for, in words; empty if nothing."""
        return host_gates(self.models[0].score.harmful.strict.refused)

    @property
    def exit_code(self) -> int:
        """0 done, 3 finished but a gate failed."""
        return 3 if self.failed_gates else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats rounded to six significant digits."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        for entry, model in zip(plain["models"], self.models, strict=True):
            entry["score"]["summary"] = model.score.summary
        plain["summary_formula"] = SUMMARY_FORMULA
        plain["failed_gates"] = self.failed_gates
        plain["exit_code"] = self.exit_code
        result: dict[str, Any] = rounded(plain)
        return result
