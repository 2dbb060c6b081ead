"""Errors that a user can act on. Each message names the key or file, the value seen and what is accepted."""


class MegatronExtError(Exception):
    """Base of every error that is caused by input and not by a defect of this package.

    A message quotes what files hold. Control characters and lone surrogates are escaped, so that it can be printed and steers no terminal.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


class ConfigError(MegatronExtError, ValueError):
    """A configuration key or value that cannot be used."""


class DataError(MegatronExtError, ValueError):
    """A document, tokenizer or data file that cannot be used."""


class CheckpointError(MegatronExtError, RuntimeError):
    """A checkpoint that cannot be written, or is missing, incomplete or altered."""


class StorageError(CheckpointError):
    """A checkpoint that could not be written: disk full, permissions, a file system that failed."""


class NonFiniteError(CheckpointError):
    """A checkpoint that was not written, because its weights are not finite."""


class TrainingError(MegatronExtError, RuntimeError):
    """A run whose steps are too bad to go on."""


class ReplicaError(MegatronExtError):
    """Ranks that must hold the same values do not."""
