"""Where memory runs out: smaller batches first, and the caller's other ways out only then."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Result = TypeVar("Result")


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory is used up; on the CPU torch raises a plain RuntimeError for it."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(
        words in str(problem) for words in ("not enough memory", "allocate memory")
    )


def release_memory() -> None:
    """Give back what a failed attempt held; call it when its exception is gone, whose traceback holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_cpu_in_reserve(
    work: Callable[[torch.device], Result], device: torch.device, warn: Callable[[str], None]
) -> Result:
    """The result of `work` on a device, or on the CPU where the device has no memory for it.

    Args:
        work: must be repeatable.
        device: where to begin.
        warn: told when the CPU has to do it.
    """
    try:
        return work(device)
    except Exception as problem:
        if not is_out_of_memory(problem) or device.type == "cpu":
            raise
    release_memory()
    warn(f"out of memory on {device.type}: solving on the CPU, which is slower")
    return work(torch.device("cpu"))


def _ignore(_message: str) -> None:
    """Nobody wants to know."""


@dataclass
class BatchSize:
    """How large batches may be; halved each time memory runs out, for good.

    Attributes:
        warn: told the first time.
        divisor: how many times smaller batches are than what is asked for.
        largest: how many prompts the largest batch had since the last change.
    """

    warn: Callable[[str], None] = field(default=_ignore)
    divisor: int = 1
    largest: int = 0

    def limit(self, tokens: int) -> int:
        """How many tokens a batch may have where `tokens` are asked for."""
        return tokens // self.divisor

    def in_pieces(self, rows: list[int], work: Callable[[list[int]], None]) -> None:
        """`work` on some prompts, or on each half of them where memory runs out, and so on down to one prompt.

        Args:
            rows: which prompts.
            work: must be repeatable: what it had done to a piece when it failed is done again.
        """
        try:
            work(rows)
            return
        except Exception as problem:
            self.largest = len(rows)
            if not is_out_of_memory(problem) or not self._halve():
                raise
        release_memory()
        middle = len(rows) // 2
        self.in_pieces(rows[:middle], work)
        self.in_pieces(rows[middle:], work)

    def restarting(self, work: Callable[[Callable[[int], None]], Result], advance: Callable[[int], None]) -> Result:
        """The result of `work`, which begins anew with smaller batches each time memory runs out.

        Args:
            work: receives the function to call with the steps done; leaves nothing behind when it fails.
            advance: receives the steps, those of a failed attempt with a minus as well.
        """
        while True:
            done = 0

            def tell(steps: int) -> None:
                nonlocal done
                done += steps
                advance(steps)

            try:
                return work(tell)
            except Exception as problem:
                if not is_out_of_memory(problem) or not self._halve():
                    raise
            advance(-done)
            release_memory()

    def _halve(self) -> bool:
        """Make batches smaller; False where they have one prompt each already."""
        if self.largest <= 1:
            return False
        if self.divisor == 1:
            self.warn("out of memory: going on with smaller batches, which is slower")
        self.divisor *= 2
        self.largest = 0
        return True
