"""Errors a user can cause. A command prints their sentence alone and exits with a non-zero
status.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class TesseraError(Exception):
    """Base class: the message is one sentence saying what is wrong, with what values, and what to
    change.
    """


class ConfigError(TesseraError, ValueError):
    """An option, preset or combination of options that cannot work."""


class DataError(TesseraError):
    """A missing, empty or corrupt data set, index or tokenizer."""


class CheckpointError(TesseraError):
    """A checkpoint that is missing, damaged, incomplete or of another architecture."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing, cut or changed: an older one may serve in its place."""


class ConversionError(TesseraError):
    """Hugging Face weights or a config that cannot be mapped exactly."""


class TrainingError(TesseraError):
    """A run that cannot go on: too many skipped steps, a hung or dead rank."""


@contextmanager
def about(subject: object) -> Iterator[None]:
    """Put a file or option before the sentence of an error that does not begin with it.

    For checks that are the same wherever their values come from, and so cannot say it themselves.

    Raises:
        TesseraError: as raised inside, of the same class.
    """
    try:
        yield
    except TesseraError as error:
        if str(error).startswith(str(subject)):
            raise
        raise type(error)(f"{subject}: {error}") from error
