"""Run a model on prompts and score what came out: the one way in which csulora measures behaviour.

`run_model` needs the host; `score_run` needs only what it gave, for the model and for the two that it is compared with.
Nothing here chooses anything.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from csulora_cli.engine.attach import Update
from csulora_cli.engine.host import Host
from csulora_cli.engine.measure import mean_kl
from csulora_cli.promptset import Prompts
from csulora_cli.refusals import ANSWER_TOKENS, Answer, RefusalTest, count_answers
from csulora_cli.scores import (
    LEAST_EXACT_GAIN,
    LEAST_KL,
    LEAST_NLL_GAIN,
    AnswerCounts,
    KindScore,
    ModelScore,
    Retention,
    RetentionKind,
    TaskScore,
)
from csulora_cli.stats import Count, retention
from csulora_cli.taskset import TaskExample
from csulora_cli.text import words_of

# Greedy answers to task prompts may be this much longer than the longest response, and no longer than that.
TASK_SLACK_TOKENS = 8
MAX_TASK_TOKENS = 512

KINDS = ("harmful", "lookalikes", "general")

Advance = Callable[[int], None]


def _ignore(_steps: int) -> None:
    """No progress wanted."""


@dataclass(frozen=True)
class ScoringPrompts:
    """What models are scored on; none of it may have given directions or chosen λ.

    Attributes:
        harmful: an answer is attack success.
        lookalikes: benign, in the form of harmful ones; a refusal is over-refusal.
        general: benign everyday prompts; the same tuple as `lookalikes` where a file does not tell them apart.
        task: of the adapter's own task; empty if there is none.
    """

    harmful: tuple[str, ...]
    lookalikes: tuple[str, ...]
    general: tuple[str, ...]
    task: tuple[TaskExample, ...] = ()

    @classmethod
    def of(cls, prompts: Prompts, task: Sequence[TaskExample] = ()) -> "ScoringPrompts":
        """The prompts of one split; where it has one kind of benign prompts only, these stand for both."""
        return cls(
            prompts.harmful, prompts.lookalikes or prompts.benign, prompts.general or prompts.benign, tuple(task)
        )

    @property
    def has_general(self) -> bool:
        """Whether everyday prompts are told apart from look-alikes."""
        return self.general != self.lookalikes

    def without(self, used: Collection[str]) -> "ScoringPrompts":
        """The same but for prompts that a repair has used, the task's included; words count, not how they are set."""
        known = set(map(words_of, used))

        def unused(prompts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(prompt for prompt in prompts if words_of(prompt) not in known)

        return ScoringPrompts(
            unused(self.harmful),
            unused(self.lookalikes),
            unused(self.general),
            tuple(example for example in self.task if words_of(example.prompt) not in known),
        )

    def count_beyond(self, kept: "ScoringPrompts") -> int:
        """How many prompts these are beyond those that are left of them."""
        return sum(len(getattr(self, kind)) - len(getattr(kept, kind)) for kind in (*KINDS, "task"))

    def lacks_nothing_of(self, whole: "ScoringPrompts") -> bool:
        """Whether something is left of every kind that the whole has, the task included."""
        return all(getattr(self, kind) or not getattr(whole, kind) for kind in (*KINDS, "task"))

    def first(self, limit: int | None) -> "ScoringPrompts":
        """The first `limit` of each kind; all of them for None."""
        return replace(
            self,
            harmful=self.harmful[:limit],
            lookalikes=self.lookalikes[:limit],
            general=self.general[:limit],
            task=self.task[:limit],
        )


@dataclass(frozen=True)
class EncodedTask:
    """Token ids of the task: prompts, responses with their stop tokens, the responses as text, tokens to generate."""

    prompts: list[list[int]]
    responses: list[list[int]]
    texts: tuple[str, ...]
    new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(len(response) for response in self.responses)


@dataclass(frozen=True)
class EncodedScoring:
    """`ScoringPrompts` as token ids, encoded once for all models.

    Attributes:
        answer_tokens: how many tokens of an answer are generated.
        cuts_wrong: do not generate what comes behind the first difference of a task answer to its response: that it is
            wrong is known then.
    """

    harmful: list[list[int]]
    lookalikes: list[list[int]]
    general: list[list[int]]
    task: EncodedTask | None
    answer_tokens: int
    cuts_wrong: bool = False

    @property
    def steps(self) -> int:
        """How many steps `run_model` advances."""
        kinds = len(self.harmful) + len(self.lookalikes)
        kinds += 0 if self.general == self.lookalikes else len(self.general)
        return kinds + (len(self.task.prompts) if self.task else 0)


def encode_scoring(
    host: Host, prompts: ScoringPrompts, answer_tokens: int = ANSWER_TOKENS, cuts_wrong: bool = False
) -> EncodedScoring:
    """Encode all prompts with the host's chat template."""
    return EncodedScoring(
        [host.encode(text) for text in prompts.harmful],
        [host.encode(text) for text in prompts.lookalikes],
        [host.encode(text) for text in prompts.general],
        _encode_task(host, prompts.task) if prompts.task else None,
        answer_tokens,
        cuts_wrong,
    )


def _encode_task(host: Host, examples: Sequence[TaskExample]) -> EncodedTask:
    responses = [host.encode_answer(example.prompt, example.response) for example in examples]
    longest = max(len(response) for response in responses)
    return EncodedTask(
        [host.encode(example.prompt) for example in examples],
        responses,
        tuple(example.response for example in examples),
        min(longest + TASK_SLACK_TOKENS, MAX_TASK_TOKENS),
    )


@dataclass(frozen=True)
class KindRun:
    """What a model gave on prompts of one kind: log p(first answer token), (N, vocab), and greedy answers."""

    log_probs: Tensor
    answers: tuple[str, ...]


def answer_is_right(answer: str, response: str) -> bool:
    """Exact match, but for white space at the ends."""
    return answer.strip() == response.strip()


def can_become(answer: str, response: str) -> bool:
    """Whether the beginning of an answer can still become the response.

    White space is left out, because decoding further tokens may move it, and so are the replacement characters that
    stand for the first bytes of a character at the end.
    """
    begun, wanted = ("".join(text.split()) for text in (answer.rstrip("\ufffd"), response))
    return wanted.startswith(begun)


@dataclass(frozen=True)
class TaskRun:
    """What a model gave on the task: greedy answers, wanted responses, and the responses' NLL over all their tokens."""

    answers: tuple[str, ...]
    responses: tuple[str, ...]
    nll: float  # nats a token

    @property
    def is_right(self) -> list[bool]:
        """Which answers are the response."""
        return [answer_is_right(*pair) for pair in zip(self.answers, self.responses, strict=True)]


@dataclass(frozen=True)
class ModelRun:
    """What a model gave on all prompts."""

    harmful: KindRun
    lookalikes: KindRun
    general: KindRun
    task: TaskRun | None


@dataclass(frozen=True)
class References:
    """What every model is compared with: the host alone, and with the adapter as trained."""

    host: ModelRun
    adapter: ModelRun


def run_kinds(
    host: Host, kinds: Sequence[list[list[int]]], answer_tokens: int, advance: Advance = _ignore
) -> list[KindRun]:
    """Run the host, as it is adapted at the moment, on prompts of several kinds, which share their batches."""
    prompts = [ids for kind in kinds for ids in kind]
    log_probs, answers = host.first_and_answers(prompts, answer_tokens, advance)
    left = iter(answers)
    pieces = torch.split(log_probs, [len(kind) for kind in kinds])
    return [KindRun(piece, tuple(islice(left, len(piece)))) for piece in pieces]


def run_model(host: Host, prompts: EncodedScoring, update: Update, advance: Advance = _ignore) -> ModelRun:
    """Run the host with an adapter (an empty one: alone) on all prompts; advances by `prompts.steps` in total.

    Raises:
        HostError: the model gives NaN, or has no such module.
    """
    with host.adapted(update):
        kinds = [prompts.harmful, prompts.lookalikes]
        if prompts.general != prompts.lookalikes:
            kinds.append(prompts.general)
        runs = run_kinds(host, kinds, prompts.answer_tokens, advance)
        task = _run_task(host, prompts.task, prompts.cuts_wrong, advance) if prompts.task else None
        return ModelRun(runs[0], runs[1], runs[-1], task)


def _run_task(host: Host, task: EncodedTask, cuts_wrong: bool, advance: Advance) -> TaskRun:
    def is_wrong(place: int, answer: str) -> bool:
        return not can_become(answer, task.texts[place])

    nll = sum(host.answer_nll(task.prompts, task.responses)) / sum(len(response) for response in task.responses)
    answers = host.answers(task.prompts, task.new_tokens, advance, is_wrong if cuts_wrong else None)
    return TaskRun(tuple(answers), task.texts, nll)


def score_model(
    host: Host,
    prompts: EncodedScoring,
    update: Update,
    references: References,
    advance: Advance = _ignore,
) -> ModelScore:
    """`run_model` and `score_run` in one step."""
    return score_run(run_model(host, prompts, update, advance), references)


def score_run(run: ModelRun, references: References) -> ModelScore:
    """All metrics of one model. Pure."""
    host, adapter = references.host, references.adapter
    general = score_kind(run.general, host.general, adapter.general)
    task = score_task(run.task, host.task, adapter.task) if run.task and host.task and adapter.task else None
    return ModelScore(
        harmful=score_kind(run.harmful, host.harmful, adapter.harmful),
        lookalikes=score_kind(run.lookalikes, host.lookalikes, adapter.lookalikes),
        general=general,
        task=task,
        retention=_retention(task, general, mean_kl(adapter.general.log_probs, host.general.log_probs)),
    )


def score_kind(run: KindRun, host: KindRun, adapter: KindRun) -> KindScore:
    """One model on prompts of one kind, compared with the host and the adapter on the same prompts. Pure."""
    answers = {}
    for test in RefusalTest:
        counts = count_answers(run.answers, test)
        answers[test] = AnswerCounts(counts[Answer.REFUSAL], counts[Answer.ANSWER], counts[Answer.INCOHERENT])
    return KindScore(answers, mean_kl(host.log_probs, run.log_probs), mean_kl(adapter.log_probs, run.log_probs))


def score_task(run: TaskRun, host: TaskRun, adapter: TaskRun) -> TaskScore:
    """One model on the task: exact match, NLL, and how much of the adapter's gain over the host is left. Pure."""
    exact, host_exact, adapter_exact = (
        Count.of(sum(each.is_right), len(each.answers)) for each in (run, host, adapter)
    )
    return TaskScore(
        exact,
        run.nll,
        retention(host_exact.share, adapter_exact.share, exact.share, LEAST_EXACT_GAIN),
        retention(-host.nll, -adapter.nll, -run.nll, LEAST_NLL_GAIN),
    )


def _retention(task: TaskScore | None, general: KindScore, adapter_kl_to_host: float) -> Retention:
    """By exact match where the adapter gained in that, else by NLL; without a task by KL on general prompts.

    The last is 1 − KL(adapter ‖ model)/KL(adapter ‖ host).
    """
    if task is not None:
        if task.exact_retention is not None:
            return Retention(task.exact_retention, RetentionKind.EXACT_MATCH)
        return Retention(task.nll_retention, RetentionKind.NLL)
    return Retention(retention(-adapter_kl_to_host, 0.0, -general.kl_to_adapter, LEAST_KL), RetentionKind.GENERAL_KL)
