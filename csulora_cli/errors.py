"""Every error that csulora raises on purpose, in one tree.

    CsuloraError                 exit code
    ├── UsageError               2   the command line or a setting is wrong
    ├── InputError               4   an input cannot be used
    │   ├── AdapterError             the adapter folder, its config or its tensors
    │   │   └── UnsupportedError     a feature of LoRA adapters that csulora does not repair
    │   ├── HostError                the host or the unaligned checkpoint
    │   ├── PromptsError             the prompts file
    │   └── HubError                 a download
    ├── ResourceError            5   out of memory or disk
    └── VerificationError        1   the written file is not what was promised: a bug

`message` says what is wrong and with which value; `hint` says what to type or change next. Exit code 3 (finished, but a
gate failed) is no error: it is a property of the report.
"""


class CsuloraWarning(UserWarning):
    """A warning of csulora itself (the library reports through callbacks; tests turn these into errors)."""


class CsuloraError(Exception):
    """Root of the tree.

    Args:
        message: what is wrong, with the value that is wrong. One line.
        hint: what to do next. One line, may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CsuloraError):
    """The command line, the config file or a setting is wrong."""

    exit_code = 2


class InputError(CsuloraError):
    """An input cannot be used."""

    exit_code = 4


class AdapterError(InputError):
    """The adapter folder, its config or its tensors cannot be used."""


class UnsupportedError(AdapterError):
    """The adapter uses a feature that csulora does not repair (named in the message)."""


class HostError(InputError):
    """The host or the unaligned checkpoint cannot be used, or does not fit the adapter."""


class PromptsError(InputError):
    """The prompts file cannot be used."""


class HubError(InputError):
    """A file could not be fetched from the Hub."""


class ResourceError(CsuloraError):
    """Out of memory or disk."""

    exit_code = 5


class VerificationError(CsuloraError):
    """What was written is not what was promised. Nothing is left behind."""
