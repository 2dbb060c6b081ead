"""Errors that a user can act on. Each message names the key or file, the value seen and what is accepted."""

LONGEST_LINE = 4000
"""Characters of a line of a message. A line with more quotes a spoilt file, and nobody reads it to its end."""


class MegatronExtError(Exception):
    """Base of every error that is caused by input and not by a defect of this package.

    A message quotes what files hold. Control characters and lone surrogates are escaped, so that it can be printed and steers no terminal;
    of a line of more than ``LONGEST_LINE`` characters the beginning and the end are kept.
    """

    def __str__(self) -> str:
        return "\n".join(_cut(_printable(line)) for line in super().__str__().split("\n"))


def _printable(line: str) -> str:
    return line if line.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def _cut(line: str) -> str:
    left_out = len(line) - LONGEST_LINE
    if left_out <= 0:
        return line
    return f"{line[: LONGEST_LINE // 2]} [{left_out:,} characters left out] {line[-LONGEST_LINE // 2 :]}"


class ConfigError(MegatronExtError, ValueError):
    """A configuration key or value that cannot be used."""


class DataError(MegatronExtError, ValueError):
    """A document, tokenizer or data file that cannot be used."""


class CheckpointError(MegatronExtError, RuntimeError):
    """A checkpoint that cannot be written, or is missing, incomplete or altered."""


class StorageError(CheckpointError):
    """A checkpoint, or a record of a run, that could not be written: disk full, permissions, a file system that failed."""


class NonFiniteError(CheckpointError):
    """A checkpoint that was not written, because its weights are not finite."""


class TrainingError(MegatronExtError, RuntimeError):
    """A run whose steps are too bad to go on."""


class ReplicaError(MegatronExtError):
    """Ranks that must hold the same values do not."""
