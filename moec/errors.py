"""Every error that moec raises on purpose, one class per exit code; imports nothing.

An error says what is wrong, where (`where`: a file, tensor or argument), what was
needed (`need`) and what to try (`hint`). The command line prints the four lines and
exits with `exit_code`; the Python API raises the exception itself.
"""

from __future__ import annotations


class MoecError(Exception):
    """Base of all moec errors.

    Attributes: `message` (what is wrong), `where` (file, tensor or argument),
    `need` (what was expected), `hint` (what to try). The last three may be None.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        need: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.need = need
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message]
        for label, text in (("in", self.where), ("need", self.need), ("try", self.hint)):
            if text:
                lines.append(f"  {label:<4} {text}")
        return "\n".join(lines)


class UsageError(MoecError):
    """The command line or a Python argument makes no sense (exit code 2)."""

    exit_code = 2


class BadInput(MoecError):
    """What the user handed in is wrong (exit code 3); base of the classes below."""

    exit_code = 3


class BadCheckpoint(BadInput):
    """A checkpoint file, index or config cannot be read safely."""


class BadSpec(BadInput):
    """A config describes a layer that is contradictory or that moec does not know."""


class BadWeights(BadInput):
    """Tensors are missing, extra, wrongly shaped, of mixed dtype or not finite."""


class InputError(BadInput):
    """A tensor passed to a compiled function has a wrong shape, dtype, device or layout."""


class TargetError(MoecError):
    """A target or schedule is unknown, unsupported here, or refuses the layer (exit code 4)."""

    exit_code = 4


class CheckFailed(MoecError):
    """A result or digest differs from what was expected (exit code 5)."""

    exit_code = 5


class ArtifactError(CheckFailed):
    """An artifact is damaged, incomplete, or made by versions that do not fit."""


class ResourceError(MoecError):
    """Memory or disk does not suffice; nothing partial is left behind (exit code 6)."""

    exit_code = 6
