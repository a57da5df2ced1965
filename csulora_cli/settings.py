"""Every setting of every command, with its default, checked once. No torch in here: `--help` reads it."""

import re
import tomllib
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from csulora_cli.errors import UsageError
from csulora_cli.refusals import ANSWER_TOKENS
from csulora_cli.text import printable


class Source(StrEnum):
    """Where the directions come from."""

    PROMPTS = "prompts"
    WEIGHTS = "weights"


class Geometry(StrEnum):
    """What the weights source does with the displacement's directions."""

    KEEP_IN = "keep-in"
    KEEP_OUT = "keep-out"


class DoraMode(StrEnum):
    """What is done with the magnitudes of DoRA."""

    KEEP = "keep"
    MERGE_SVD = "merge-svd"
    REFUSE = "refuse"


class RankMode(StrEnum):
    """What keep-in does with the rank, which its closed form doubles."""

    KEEP = "keep"
    EXACT = "exact"


# Defaults that only one source reads. They are None in FixSettings, so that a setting that the chosen source would
# ignore is noticed instead of forgotten.
DEFAULT_PROTECT = 1.0
DEFAULT_TARGET = 0.06
DEFAULT_GEOMETRY = Geometry.KEEP_OUT
DEFAULT_WEIGHTS_STRENGTH = 1.0
DEFAULT_SUBSPACE_ENERGY = 0.9
AUTO: Literal["auto"] = "auto"

# Nats that one harmful prompt counts at most when λ is judged. On a prompt for which the host itself is undecided a
# repair can be many nats away and have lost nothing; without a bound one such prompt of forty chooses λ.
MOST_A_PROMPT = 1.0

DEVICES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FixSettings:
    """What `fix_adapter` is asked to do. Locations are local folders or Hub ids (`org/name`, `org/name@revision`).

    Attributes:
        adapter: the adapter to repair.
        base: the host, the model that the adapter was trained on; None takes it from the adapter's config.
        unaligned: the checkpoint that the host was aligned from; needed for the weights source.
        out: the folder to write; None means `<adapter name>-csulora` in the current folder.
        report: an HTML page to write, too; it may lie in `out`.
        source: prompts or weights; None means weights if `unaligned` is given, else prompts.
        prompts: a JSONL file of harmful and benign prompts; None takes the set that ships with csulora.
        geometry: keep-in or keep-out, weights source (default keep-out).
        strength: λ, or "auto"; None means auto where prompts tell what fades, else `DEFAULT_WEIGHTS_STRENGTH`.
        protect: β, prompts source (default `DEFAULT_PROTECT`); with keep-out (default 0) prompts are run as well,
            and tell what fades along the displacement's directions.
        target: auto takes the smallest λ with KL(host ‖ repaired) <= target · KL(host ‖ adapter), in which no
            prompt counts more than `MOST_A_PROMPT` nats (default `DEFAULT_TARGET`).
        subspace_energy: τ, the share of ‖D‖² that the directions must hold, weights source (default 0.9).
        subspace_rank: k, in the place of τ.
        rank: keep the rank, or write the exact rank-2r update; keep-in only (default keep).
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: of the host's forward pass: auto, float32, bfloat16 or float16.
        revision: of the adapter on the Hub.
        trust_remote_code: let the host's own Python code run.
        overwrite: replace an existing output folder that holds an adapter, and an existing report.
        dora: keep the gain that DoRA gives each row and repair the update beside it, or merge both into plain LoRA of
            the same rank, or refuse such adapters.
        strict: refuse an adapter that carries anything but low-rank updates.

    Raises:
        UsageError: a value out of range, or one that the chosen source does not read.
    """

    adapter: str
    base: str | None = None
    unaligned: str | None = None
    out: Path | None = None
    report: Path | None = None
    source: Source | None = None
    prompts: Path | None = None
    geometry: Geometry | None = None
    strength: float | Literal["auto"] | None = None
    protect: float | None = None
    target: float | None = None
    subspace_energy: float | None = None
    subspace_rank: int | None = None
    rank: RankMode | None = None
    device: str = AUTO
    dtype: str = AUTO
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    dora: DoraMode = DoraMode.KEEP
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.adapter:
            raise UsageError("no adapter given", "csulora fix ADAPTER --base MODEL")
        self._check_sources()
        if isinstance(self.strength, str) and self.strength != AUTO:
            raise UsageError(f"--strength is {printable(self.strength)}, not a number or auto", "Try --strength auto.")
        if isinstance(self.strength, (int, float)):
            _check("--strength", self.strength, 0, MAX_STRENGTH)
        if self.protect is not None:
            _check("--protect", self.protect, 0, MAX_STRENGTH)
        if self.target is not None:
            _check("--target", self.target, 0, 1)
        if self.subspace_energy is not None:
            _check("--subspace-energy", self.subspace_energy, 1e-6, 1)
        if self.subspace_rank is not None and self.subspace_rank < 1:
            raise UsageError(f"--subspace-rank is {self.subspace_rank}, not a whole number above 0")
        if self.report is not None:
            check_report_name(self.report)
        check_machine(self.device, self.dtype)

    def _check_sources(self) -> None:
        if self.chosen_source is Source.WEIGHTS:
            if self.unaligned is None:
                raise UsageError("--source weights needs the unaligned checkpoint", "Add --unaligned MODEL.")
            if self.protect is not None and self.chosen_geometry is Geometry.KEEP_IN:
                raise UsageError("--protect does not apply to --geometry keep-in", "Leave one of them out.")
            if self.prompts is not None and not self.runs_prompts:
                raise UsageError(
                    "--prompts is not read by the weights source with a fixed strength", "Add --strength auto."
                )
        else:
            only_weights = {
                "--unaligned": self.unaligned,
                "--geometry": self.geometry,
                "--subspace-energy": self.subspace_energy,
                "--subspace-rank": self.subspace_rank,
                "--rank": self.rank,
            }
            for option, value in only_weights.items():
                if value is not None:
                    raise UsageError(
                        f"{option} applies to the weights source only",
                        "Add --unaligned MODEL and leave --source prompts out, or leave it out.",
                    )
        if self.rank is RankMode.EXACT and self.chosen_geometry is not Geometry.KEEP_IN:
            raise UsageError("--rank exact applies to --geometry keep-in only: keep-out never changes the rank")
        if self.subspace_energy is not None and self.subspace_rank is not None:
            raise UsageError("--subspace-energy and --subspace-rank exclude each other", "Give one of them.")

    @property
    def chosen_source(self) -> Source:
        """The source, also when it follows from `unaligned`."""
        return self.source or (Source.WEIGHTS if self.unaligned else Source.PROMPTS)

    @property
    def chosen_geometry(self) -> Geometry:
        """The geometry of the weights source."""
        return self.geometry or DEFAULT_GEOMETRY

    @property
    def chosen_rank(self) -> RankMode:
        """What keep-in does with the rank."""
        return self.rank or RankMode.KEEP

    @property
    def chosen_protect(self) -> float:
        """β; 0 where the weights source is not told to protect anything."""
        if self.protect is not None:
            return self.protect
        return DEFAULT_PROTECT if self.chosen_source is Source.PROMPTS else 0.0

    @property
    def fades_on_prompts(self) -> bool:
        """True if prompts tell what fades: in the prompts source, and in keep-out that protects."""
        return self.chosen_source is Source.PROMPTS or self.chosen_protect > 0

    @property
    def runs_prompts(self) -> bool:
        """True if the host is run, for directions or for λ."""
        return self.fades_on_prompts or self.is_auto

    @property
    def chosen_target(self) -> float:
        """The share of KL(host ‖ adapter) that auto may leave."""
        return DEFAULT_TARGET if self.target is None else self.target

    @property
    def chosen_energy(self) -> float:
        """τ of the weights source."""
        return DEFAULT_SUBSPACE_ENERGY if self.subspace_energy is None else self.subspace_energy

    @property
    def is_auto(self) -> bool:
        """True if λ is found by measuring."""
        return self.strength == AUTO or (self.strength is None and self.fades_on_prompts)

    @property
    def fixed_strength(self) -> float | None:
        """λ if it is a number, None if it is found by measuring."""
        if self.is_auto:
            return None
        return DEFAULT_WEIGHTS_STRENGTH if self.strength is None else float(self.strength)


MAX_STRENGTH = 1e6


@dataclass(frozen=True)
class EvalSettings:
    """What `evaluate_adapters` is asked to do. Locations are local folders or Hub ids, as in `FixSettings`.

    Attributes:
        adapters: the adapter as trained, then any number of repairs of it.
        base: the host; None takes it from the first adapter's config.
        prompts: a JSONL file of harmful and benign prompts, of which the report split is scored; None takes the set
            that ships with csulora.
        task: a JSONL file of prompts and responses of the adapter's own task.
        judge: a guard model that gives a second opinion on answers to harmful prompts.
        judge_label: the label by which a text classifier calls an answer harmful; None finds it by its name.
        answer_tokens: how many tokens of each answer are generated.
        limit: score only the first so many prompts of each kind.
        save_answers: a JSONL file to write every answer and its verdicts to.
        report: an HTML page to write.
        overwrite: replace these files if they are there.
        device, dtype, trust_remote_code: as in `FixSettings`, of the host and of the judge.

    Raises:
        UsageError: a value out of range, or one that nothing reads.
    """

    adapters: tuple[str, ...]
    base: str | None = None
    prompts: Path | None = None
    task: Path | None = None
    judge: str | None = None
    judge_label: str | None = None
    answer_tokens: int = ANSWER_TOKENS
    limit: int | None = None
    save_answers: Path | None = None
    report: Path | None = None
    overwrite: bool = False
    device: str = AUTO
    dtype: str = AUTO
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.adapters or not all(self.adapters):
            raise UsageError("no adapter given", "csulora eval ADAPTER REPAIRED --base MODEL")
        if twice := [given for given in self.adapters if self.adapters.count(given) > 1]:
            raise UsageError(f"{printable(twice[0])} is given twice", "Give every adapter once.")
        _check("--answer-tokens", self.answer_tokens, 1, MAX_ANSWER_TOKENS)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}, not a whole number above 0")
        if self.judge_label is not None and self.judge is None:
            raise UsageError("--judge-label applies with --judge only", "Add --judge MODEL.")
        if self.overwrite and self.save_answers is None and self.report is None:
            raise UsageError("--overwrite applies with --save-answers or --report only", "Leave it out.")
        if self.report is not None:
            check_report_name(self.report)
        check_machine(self.device, self.dtype)


@dataclass(frozen=True)
class CompareSettings:
    """What `compare_methods` is asked to do. Locations are local folders or Hub ids, as in `FixSettings`.

    Attributes:
        adapter: the adapter as trained.
        base: the host; None takes it from the adapter's config.
        unaligned: the checkpoint that the host was aligned from; without it, methods that need it are left out.
        methods: their names with commas between them; None takes all that the inputs allow.
        points: how many strengths of each method.
        prompts: a JSONL file of harmful and benign prompts; None takes the set that ships with csulora.
        task: a JSONL file of prompts and responses of the adapter's own task.
        answer_tokens: how many tokens of each answer are generated.
        limit: score only the first so many prompts of each kind.
        out: a folder to write the best points' adapters to.
        report: an HTML page to write; it may lie in `out`.
        overwrite: replace that folder if it holds an earlier comparison, and that page.
        revision, device, dtype, trust_remote_code: as in `FixSettings`.

    Raises:
        UsageError: a value out of range, or one that nothing reads.
    """

    adapter: str
    base: str | None = None
    unaligned: str | None = None
    methods: str | None = None
    points: int = 5
    prompts: Path | None = None
    task: Path | None = None
    answer_tokens: int = ANSWER_TOKENS
    limit: int | None = None
    out: Path | None = None
    report: Path | None = None
    overwrite: bool = False
    revision: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.adapter:
            raise UsageError("no adapter given", "csulora compare ADAPTER --base MODEL")
        if not 1 <= self.points <= MAX_POINTS:
            raise UsageError(f"--points is {self.points}, not a whole number from 1 to {MAX_POINTS}")
        _check("--answer-tokens", self.answer_tokens, 1, MAX_ANSWER_TOKENS)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}, not a whole number above 0")
        if self.overwrite and self.out is None and self.report is None:
            raise UsageError("--overwrite applies with --out or --report only", "Leave it out.")
        if self.report is not None:
            check_report_name(self.report)
        check_machine(self.device, self.dtype)

    @property
    def method_names(self) -> tuple[str, ...] | None:
        """The names in `methods`."""
        if self.methods is None:
            return None
        return tuple(name for part in self.methods.split(",") if (name := part.strip()))


MAX_POINTS = 50
MAX_ANSWER_TOKENS = 4096
# The tables of a config file; one file may hold the settings of several commands.
TABLES: dict[str, type] = {"fix": FixSettings, "eval": EvalSettings, "compare": CompareSettings}


def check_machine(device: str, dtype: str) -> None:
    """Check the spelling of --device and --dtype.

    Raises:
        UsageError: one of them is none that csulora knows.
    """
    if not DEVICES.fullmatch(device):
        raise UsageError(f"--device is {printable(device)}", "Give auto, cpu, cuda, cuda:N or mps.")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {printable(dtype)}", f"Give one of {', '.join(DTYPES)}.")


def _check(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise UsageError(f"{option} is {printable(value, 20)}, outside {low:g} to {high:g}")


def check_report_name(report: Path) -> None:
    """Check that a browser will take the file for a page, and that no other output of ours has its name.

    Raises:
        UsageError: it does not end in .html.
    """
    if report.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {printable(report)} does not end in .html", "Try --report report.html.")


def read_config_file(path: Path, command: str) -> dict[str, Any]:
    """One command's table of a TOML file, as keyword arguments of its settings; tables of other commands are left.

    An empty string stands for "not given", since TOML has no null. Unknown keys and wrong types are errors. What a
    command cannot do without stands on the command line, not here.

    Args:
        path: the file.
        command: a key of `TABLES`.

    Raises:
        UsageError: no such file, not TOML, an unknown key or a value of the wrong type.
    """
    shown = printable(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"cannot read --config {shown}: {printable(problem.strerror)}") from None
    except (ValueError, RecursionError) as problem:
        raise UsageError(f"--config {shown} is not TOML: {printable(problem)}") from None
    if unknown := set(document) - set(TABLES):
        raise UsageError(
            f"--config {shown} has unknown tables or keys: {printable(sorted(unknown))}", f"Use [{command}]."
        )
    table = document.get(command, {})
    if not isinstance(table, dict):
        raise UsageError(f"{command} in --config {shown} is not a table", f"Start it with [{command}].")
    settings = TABLES[command]
    hints = get_type_hints(settings)
    known = {field.name for field in fields(settings) if field.default is not MISSING}
    result = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(
                f"--config {shown} has the unknown key {printable(key)}", f"Known keys: {', '.join(sorted(known))}."
            )
        if value != "":
            result[name] = _typed(value, hints[name], f"{name} in --config {shown}")
    return result


def _typed(value: Any, hint: Any, where: str) -> Any:
    """One TOML value as the type of its field, which may be a union; None stands for "not given" and is no value.

    Raises:
        UsageError: it is of no type that the field takes.
    """
    is_union = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in (get_args(hint) if is_union else (hint,)) if kind is not NoneType]
    for kind in kinds:
        with suppress(_WrongTypeError):
            return _converted(value, kind)
    raise UsageError(f"{where} is {printable(value)}, not {' or '.join(_wanted(kind) for kind in kinds)}")


class _WrongTypeError(Exception):
    """A value is not of a type."""


def _converted(value: Any, kind: Any) -> Any:
    if kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):  # a whole number beyond all floats is no number that any setting takes
                return float(value)
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif issubclass(kind, StrEnum):
        if value in list(kind):
            return kind(value)
    elif kind is Path:
        if isinstance(value, str):
            return Path(value)
    elif type(value) is kind:
        return value
    raise _WrongTypeError


def _wanted(kind: Any) -> str:
    """A type in the words of an error message."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if issubclass(kind, StrEnum):
        return " or ".join(kind)
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
