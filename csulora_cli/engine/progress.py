"""How the library tells what it is doing; it prints nothing itself."""

from typing import Protocol


class Progress(Protocol):
    """Receives what a repair is doing. Calls come from the thread that runs the repair."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; `total` is its number of steps, None if it has no steps."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current stage are done."""

    def warn(self, message: str) -> None:
        """Something that the user should know, and that stops nothing."""


class Silent:
    """A `Progress` that ignores everything."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignore."""

    def advance(self, steps: int = 1) -> None:
        """Ignore."""

    def warn(self, message: str) -> None:
        """Ignore."""
