"""The host model: loading it, encoding prompts, running them, and applying an adapter to it without changing it."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from csulora_cli.engine.attach import Update, applied
from csulora_cli.engine.loading import load_weights, loading, quiet_transformers
from csulora_cli.engine.memory import BatchSize
from csulora_cli.errors import HostError, PromptsError, UsageError
from csulora_cli.formats.replication import Repeats
from csulora_cli.formats.structure import model_class
from csulora_cli.locate import Location
from csulora_cli.pretrained import check_gguf_architecture, pretrained
from csulora_cli.text import printable

PLAIN_TEMPLATE = "User: {prompt}\nAssistant:"
BATCH_TOKENS = 1024
GENERATE_TOKENS = 4096  # of prompts: a step of decoding costs nearly the same for one prompt as for many
NLL_TOKENS = 512  # logits on every answer token of a batch take tokens x vocabulary
# Templates that print today's date would give other bytes every day.
_FIXED_DATE = datetime(2025, 1, 1, tzinfo=UTC)
_DATE_CODES = "%a %A %b %B %c %d %-d %D %e %F %H %I %j %m %-m %M %p %S %T %u %w %x %X %y %Y %Z %z".split()


@contextmanager
def _within_positions(model: Any) -> Iterator[None]:
    """What a model with a table of positions says of a token behind its end, as an error of ours.

    Raises:
        PromptsError: there is such a token.
    """
    try:
        yield
    except IndexError as problem:
        if "out of range" not in str(problem):
            raise
        limit = getattr(model.config, "max_position_embeddings", None)
        raise PromptsError(
            "a prompt with its answer has more tokens than the host has positions" + (f" ({limit})" if limit else ""),
            "Leave out long prompts and responses.",
        ) from None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@dataclass
class Host:
    """A loaded language model with its tokenizer, in evaluation mode.

    Attributes:
        model: a transformers model.
        tokenizer: its tokenizer.
        device: where it runs.
        has_template: whether the tokenizer has a chat template.
        decoder_prefix: what the decoder of an encoder-decoder model begins every answer with, while its encoder reads
            the prompt; empty for a decoder-only model, whose answer follows the prompt.
        batch_size: shrinks where memory runs out.
        repeats: which of its layers are repeated, or None.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    has_template: bool
    decoder_prefix: tuple[int, ...] = ()
    batch_size: BatchSize = field(default_factory=BatchSize)
    repeats: Repeats | None = None
    _takes_logits_to_keep: bool = field(init=False)

    def __post_init__(self) -> None:
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt as the first user turn, up to where the answer begins."""
        if self.has_template:
            return self._tokens(self._render([_turn("user", prompt)], opens_answer=True))
        return list(self.tokenizer(PLAIN_TEMPLATE.format(prompt=prompt))["input_ids"])

    def encode_answer(self, prompt: str, response: str) -> list[int]:
        """Token ids that `response` has behind `encode(prompt)`, as the chat template puts it, with the stop token.

        In an encoder-decoder model they stand behind the decoder's prefix instead.
        """
        start = self.encode(prompt)
        ids = self._behind(start, prompt, response)
        stops = self._stop_ids()
        answer = list(takewhile(lambda token: token not in stops, ids))
        if len(answer) < len(ids):
            return [*answer, ids[len(answer)]]
        own = self.tokenizer.eos_token_id
        return [*answer, own if own in stops else min(stops)] if stops else answer

    def _behind(self, start: list[int], prompt: str, response: str) -> list[int]:
        if not self.has_template:
            if self.decoder_prefix:
                return self._behind_prefix(list(self.tokenizer(text_target=response)["input_ids"]))
            return list(self.tokenizer(f" {response}", add_special_tokens=False)["input_ids"])
        opened = self._render([_turn("user", prompt)], opens_answer=True)
        whole = self._render([_turn("user", prompt), _turn("assistant", response)], opens_answer=False)
        if not whole.startswith(opened):  # a template that opens an answer otherwise than it writes one
            return self._tokens(response)
        ids = self._tokens(whole)
        # Where a token spans the border, the answer is cut as it would be generated: on its own.
        return ids[len(start) :] if ids[: len(start)] == start else self._tokens(whole[len(opened) :])

    def _behind_prefix(self, target: list[int]) -> list[int]:
        """What a decoder is trained to write, without the tokens that its prefix holds already."""
        forced = list(self.decoder_prefix[1:])
        return target[len(forced) :] if target[: len(forced)] == forced else target

    def encode_exchange(self, prompt: str, answer: str) -> list[int]:
        """Token ids of a request and its answer, up to where the model speaks next: how guard models are asked."""
        return self._tokens(self._render([_turn("user", prompt), _turn("assistant", answer)], opens_answer=True))

    def _render(self, turns: list[dict[str, str]], *, opens_answer: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=opens_answer, tokenize=False, date_string=_FIXED_DATE.strftime("%d %b %Y")
            )
        except TemplateError as problem:
            raise HostError(f"the chat template of the model fails: {printable(problem)}") from None
        return text

    def _tokens(self, text: str) -> list[int]:
        # The template writes its own special tokens, BOS included.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def batches(
        self, token_lists: Sequence[Sequence[int]], limit: int = BATCH_TOKENS, ends: Sequence[int] | None = None
    ) -> Iterator["Batch"]:
        """Right-padded batches of similar lengths, at most `limit` tokens each (one prompt at least).

        Args:
            token_lists: prompts, with answers behind them or without.
            limit: of tokens.
            ends: how many tokens of each list are the prompt; None: all of them.
        """
        for rows in self._rows_of_batches(token_lists, limit):
            yield self._batch(token_lists, rows, ends)

    def _rows_of_batches(self, token_lists: Sequence[Sequence[int]], limit: int) -> Iterator[list[int]]:
        order = sorted(range(len(token_lists)), key=lambda index: (len(token_lists[index]), index))
        start = 0
        while start < len(order):
            tokens = self.batch_size.limit(limit)  # asked for each time: it may have shrunk
            stop = start + 1
            while stop < len(order) and len(token_lists[order[stop]]) * (stop + 1 - start) <= tokens:
                stop += 1
            self.batch_size.largest = max(self.batch_size.largest, stop - start)
            yield order[start:stop]
            start = stop

    def _each_batch(
        self,
        token_lists: Sequence[Sequence[int]],
        limit: int,
        work: Callable[["Batch"], None],
        ends: Sequence[int] | None = None,
    ) -> None:
        """`work` on every batch, in pieces where memory runs out; it must be repeatable."""
        for rows in self._rows_of_batches(token_lists, limit):
            self.batch_size.in_pieces(rows, lambda piece: work(self._batch(token_lists, piece, ends)))

    def _batch(self, token_lists: Sequence[Sequence[int]], rows: list[int], ends: Sequence[int] | None) -> "Batch":
        lists = [token_lists[row] for row in rows]
        stops = [len(token_lists[row]) if ends is None else ends[row] for row in rows]
        if not self.decoder_prefix:
            return Batch(rows, self._padded(lists, stops))
        answers = [[*self.decoder_prefix, *tokens[stop:]] for tokens, stop in zip(lists, stops, strict=True)]
        decoder = self._padded(answers, [len(self.decoder_prefix)] * len(rows))
        # What a module reads tells by its shape of which side it is: one is made wider where they would be alike.
        width = max(stops) + int(max(stops) == decoder.ids.shape[1])
        prompts = [tokens[:stop] for tokens, stop in zip(lists, stops, strict=True)]
        return Batch(rows, self._padded(prompts, stops, width), decoder)

    def _padded(self, lists: Sequence[Sequence[int]], ends: list[int], width: int = 0) -> "Padded":
        width = max(width, *map(len, lists))
        ids = torch.zeros(len(lists), width, dtype=torch.long)
        mask = torch.zeros(len(lists), width, dtype=torch.long)
        for index, tokens in enumerate(lists):
            ids[index, : len(tokens)], mask[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.long), 1
        return Padded(ids.to(self.device), mask.to(self.device), ends)

    @torch.inference_mode()
    def run(self, batch: "Batch", is_whole: bool = False) -> Tensor:
        """Logits of the next token after each prompt of the batch, (B, vocab), float32.

        Args:
            batch: the prompts.
            is_whole: let also the output layer run on every token, for those who watch what it reads.
        """
        ends = batch.continued.mask.sum(1) - 1  # (B,)
        positions, where = torch.unique(ends, return_inverse=True)
        keeps_some = self._takes_logits_to_keep and not is_whole
        out = self._logits(batch, positions if keeps_some else None)
        columns = where if keeps_some else ends
        return out[torch.arange(len(ends), device=out.device), columns].float()

    def _logits(self, batch: "Batch", positions: Tensor | None) -> Tensor:
        """Logits on the side that is continued, (B, T, vocab), at some positions of it or at all."""
        extra = {} if positions is None else {"logits_to_keep": positions}
        if batch.decoder is not None:
            extra |= {"decoder_input_ids": batch.decoder.ids, "decoder_attention_mask": batch.decoder.mask}
        prompts = batch.prompts
        with _within_positions(self.model):
            out: Tensor = self.model(
                input_ids=prompts.ids, attention_mask=prompts.mask, use_cache=False, **extra
            ).logits
        return out

    def first_token_log_probs(self, token_lists: Sequence[Sequence[int]]) -> Tensor:
        """log p(first answer token | prompt), (N, vocab), float32, on the CPU, in the order given.

        Raises:
            HostError: the model gives NaN.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(token_lists)

        def run(batch: Batch) -> None:
            for row, log_probs in zip(batch.rows, _log_probs(self.run(batch)), strict=True):
                rows[row] = log_probs

        self._each_batch(token_lists, BATCH_TOKENS, run)
        return torch.stack(rows)

    @torch.inference_mode()
    def answer_nll(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """−Σ log p(answer token | prompt, answer tokens before), nats, of each answer, in the order given.

        Only the logits in front of answer tokens are made, and one row at a time is widened to float32.
        """
        sums = [0.0] * len(prompts)
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

        def run(batch: Batch) -> None:
            side = batch.continued
            first = min(side.ends) - 1  # predicts the first answer token of some row
            positions = torch.arange(first, side.ids.shape[1], device=self.device)
            logits = self._logits(batch, positions if self._takes_logits_to_keep else None)
            skipped = first if self._takes_logits_to_keep else 0
            for index, row in enumerate(batch.rows):
                start, stop = side.ends[index], side.ends[index] + len(answers[row])
                predicted = logits[index, start - 1 - skipped : stop - 1 - skipped].float()  # (answer, vocab)
                sums[row] = float(nn.functional.cross_entropy(predicted, side.ids[index, start:stop], reduction="sum"))

        self._each_batch(sequences, NLL_TOKENS, run, [len(prompt) for prompt in prompts])
        return sums

    def answers(
        self,
        token_lists: Sequence[Sequence[int]],
        new_tokens: int,
        advance: Callable[[int], None] | None = None,
        is_over: Callable[[int, str], bool] | None = None,
    ) -> list[str]:
        """Greedy answers, decoded without special tokens, in the order given.

        Args:
            token_lists: the prompts.
            new_tokens: how long answers may be.
            advance: told how many are done.
            is_over: whether enough is known of an answer, from its prompt's place and what there is of it; the rest is
                then not generated.
        """

        def text(tokens: Sequence[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

        wanted = None if is_over is None else lambda row, tokens: is_over(row, text(tokens))
        return [text(tokens) for tokens in self.generate(token_lists, new_tokens, advance, is_over=wanted)]

    def first_and_answers(
        self, token_lists: Sequence[Sequence[int]], new_tokens: int, advance: Callable[[int], None] | None = None
    ) -> tuple[Tensor, list[str]]:
        """`first_token_log_probs` and `answers` from one pass over the prompts.

        Raises:
            HostError: the model gives NaN.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(token_lists)

        def keep(batch: Batch, logits: Tensor) -> None:
            for row, log_probs in zip(batch.rows, _log_probs(logits), strict=True):
                rows[row] = log_probs

        tokens = self.generate(token_lists, new_tokens, advance, keep)
        return torch.stack(rows), [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    @torch.inference_mode()
    @quiet_transformers()
    def generate(
        self,
        token_lists: Sequence[Sequence[int]],
        new_tokens: int,
        advance: Callable[[int], None] | None = None,
        take_first: Callable[["Batch", Tensor], None] | None = None,
        is_over: Callable[[int, Sequence[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Greedy answers as token ids, up to where the host's own stop token ends them, in the order given.

        Args:
            token_lists: the prompts.
            new_tokens: how long answers may be.
            advance: told how many are done.
            take_first: receives the logits of the first answer tokens of a batch, (B, vocab), float32.
            is_over: whether to stop an answer, from its prompt's place and its tokens so far.
        """
        answers: list[list[int]] = [[]] * len(token_lists)
        stops = self._stop_ids()

        def run(batch: Batch) -> None:
            if batch.decoder is None:
                prompts, extra = _left_padded(batch.prompts), {}
            else:
                prompts, extra = batch.prompts, {"decoder_input_ids": batch.decoder.ids}
            width = batch.continued.ids.shape[1]
            with _within_positions(self.model):
                out = self.model.generate(
                    input_ids=prompts.ids,
                    attention_mask=prompts.mask,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=self._pad_id(),
                    **_watchers(batch, width, take_first, is_over),
                    **extra,
                )
            for index, row in enumerate(batch.rows):
                answers[row] = list(takewhile(lambda token: token not in stops, out[index, width:].tolist()))
            if advance:
                advance(len(batch.rows))

        self._each_batch(token_lists, GENERATE_TOKENS, run)
        return answers

    def _stop_ids(self) -> set[int]:
        own = self.model.generation_config.eos_token_id
        return set(own) if isinstance(own, list) else {own} - {None}

    def _pad_id(self) -> int:
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(candidate, int):
                return candidate
        return 0

    @property
    def settings(self) -> dict[str, Any]:
        """How it is run, for reports."""
        used = {
            "device": self.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "chat_template": self.has_template,
        }
        return used | ({"decoder_prefix": list(self.decoder_prefix)} if self.decoder_prefix else {})

    def adapted(self, update: Update) -> AbstractContextManager[None]:
        """Run the host with an adapter."""
        return applied(self.model, update)


@dataclass(frozen=True)
class Padded:
    """Lists of tokens, padded on the right.

    Attributes:
        ids, mask: (B, T), mask 1 on real tokens.
        ends: how many tokens of each list come before the answer.
    """

    ids: Tensor
    mask: Tensor
    ends: list[int]


@dataclass(frozen=True)
class Batch:
    """Some prompts, with answers or without.

    Attributes:
        rows: their places in the list of all.
        prompts: the prompts with their answers, or, in an encoder-decoder model, what the encoder reads: prompts alone.
        decoder: what the decoder of such a model reads, its prefix and the answers, of another width; else None.
    """

    rows: list[int]
    prompts: Padded
    decoder: Padded | None = None

    @property
    def sides(self) -> tuple[Padded, ...]:
        """All that the model reads."""
        return (self.prompts,) if self.decoder is None else (self.prompts, self.decoder)

    @property
    def continued(self) -> Padded:
        """The side that the answers are written on."""
        return self.sides[-1]


def _left_padded(prompts: Padded) -> Padded:
    """The same with the padding on the left, where generation wants it."""
    width = prompts.ids.shape[1]
    shift = width - prompts.mask.sum(1)
    columns = (torch.arange(width, device=prompts.ids.device)[None] - shift[:, None]) % width
    return replace(prompts, ids=prompts.ids.gather(1, columns), mask=prompts.mask.gather(1, columns))


def _log_probs(logits: Tensor) -> Tensor:
    """log p from logits, (B, vocab), on the CPU.

    Raises:
        HostError: there is NaN.
    """
    log_probs = logits.log_softmax(-1).cpu()
    if bool(log_probs.isnan().any()):
        raise HostError("the host or the adapter gives NaN instead of probabilities", "Try --dtype float32.")
    return log_probs


def _watchers(
    batch: Batch,
    width: int,
    take_first: Callable[[Batch, Tensor], None] | None,
    is_over: Callable[[int, Sequence[int]], bool] | None,
) -> dict[str, Any]:
    """What transformers' `generate` takes to hand over first logits and to end answers, see `Host.generate`."""
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    class First(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if take_first is not None and input_ids.shape[1] == width:
                take_first(batch, scores)
            return scores

    class Over(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.is_done = [False] * len(batch.rows)

        def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
            assert is_over is not None
            for index, row in enumerate(batch.rows):
                self.is_done[index] = self.is_done[index] or is_over(row, input_ids[index, width:].tolist())
            return torch.tensor(self.is_done, device=input_ids.device)

    options: dict[str, Any] = {}
    if take_first is not None:
        options["logits_processor"] = LogitsProcessorList([First()])
    if is_over is not None:
        options["stopping_criteria"] = StoppingCriteriaList([Over()])
    return options


def choose_device(name: str) -> torch.device:
    """The device to run on; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # an index that no machine has
        device = None
    if device is None or not _is_there(device):
        raise UsageError(f"--device {name} is not available here", "Use --device auto or --device cpu.")
    return device


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return torch.backends.mps.is_available() if device.type == "mps" else True


def solver_device(device: torch.device) -> torch.device:
    """Where float64 mathematics runs: MPS has none, so its share goes to the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def load_host(
    location: Location,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    role: str = "host",
    modules: Collection[str] = (),
) -> Host:
    """Load the host (or a language model in another role) through transformers, without any adapter.

    Args:
        location: its folder or GGUF file.
        device: where to run it.
        dtype: auto (as stored; float32 in the place of float16 on the CPU), float32, bfloat16 or float16.
        trust_remote_code: let the host's own code run.
        role: what the model is called in errors.
        modules: see `model_class`.

    Raises:
        HostError: transformers cannot load it, it lacks weights or has some that cannot run there, or it does not say
            how its decoder begins.
    """
    import transformers

    hint = "Check that transformers can load it as a causal or sequence-to-sequence language model."
    with loading(location, role, hint), pretrained(location, trust_remote_code) as source:
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
        check_gguf_architecture(location, config, role)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.name, **source.options)
        kind = model_class(config, trust_remote_code, modules)
        model = load_weights(kind, source, config, dtype, device, location, role)
    tokenizer.chat_template = _dateless(getattr(tokenizer, "chat_template", None))
    prefix = _decoder_prefix(model, location, role)  # from settings that the next line drops
    model.generation_config = _stops_only(model.generation_config, prefix)
    return Host(model, tokenizer, device, bool(tokenizer.chat_template), prefix)


def _decoder_prefix(model: Any, location: Location, role: str) -> tuple[int, ...]:
    """What the decoder begins every answer with: its start token, and the token that is forced behind it if one is.

    Empty for a decoder-only model.
    """
    if not model.config.is_encoder_decoder:
        return ()
    theirs = model.generation_config
    named = (theirs.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), theirs.bos_token_id)
    start = next((token for token in named if token is not None), None)
    wanted = [start] if theirs.forced_bos_token_id is None else [start, theirs.forced_bos_token_id]
    prefix = tuple(token for token in wanted if isinstance(token, int))
    if len(prefix) < len(wanted):
        raise HostError(
            f"the {role} {printable(location.given)} does not say with which tokens its decoder begins",
            "Name one token as decoder_start_token_id in its generation_config.json.",
        )
    return prefix


def _dateless(template: Any) -> Any:
    """A chat template (or several by name) in which `strftime_now` gives a fixed date.

    A macro does it: transformers hands no callable on to a template.
    """
    if isinstance(template, dict):
        return {name: _dateless(text) for name, text in template.items()}
    if not template or "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('{code}', '{_FIXED_DATE.strftime(code)}')" for code in _DATE_CODES)
    # The plus keeps a line break that the template begins with.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro +%}}{template}"


def _stops_only(theirs: Any, decoder_prefix: tuple[int, ...]) -> Any:
    """Generation settings with nothing but the special tokens of the host's own: no sampling, beams or penalties."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = {name: getattr(theirs, name, None) for name in names}
    return GenerationConfig(**own, decoder_start_token_id=decoder_prefix[0] if decoder_prefix else None)
