import errno

import pytest

from megatron_ext.checkpoint.attempts import Attempt, attempt, failure
from megatron_ext.errors import CheckpointError, NonFiniteError, StorageError


def failing(error: Exception) -> Attempt:
    def action() -> None:
        raise error

    return attempt(action)


FULL = failing(OSError(errno.ENOSPC, "full"))
NAN = failing(NonFiniteError("a is not finite"))
OTHER = failing(ValueError("odd"))


def test_a_good_attempt_has_a_result_and_is_no_failure() -> None:
    good = attempt(lambda: [1])
    assert (good.result, good.error, good.message, good.errno) == ([1], None, None, None) and good.seconds >= 0
    assert failure({"rank 0": good}) is None


@pytest.mark.parametrize(
    ("attempts", "kind"),
    [([FULL], StorageError), ([OTHER], CheckpointError), ([FULL, NAN], NonFiniteError), ([FULL, OTHER], CheckpointError)],
)
def test_only_storage_that_failed_alone_is_a_storage_error(attempts: list[Attempt], kind: type[Exception]) -> None:
    error = failure({f"rank {rank}": each for rank, each in enumerate(attempts)})
    assert type(error) is kind and all(f"rank {rank}: cannot save the checkpoint: " in str(error) for rank in range(len(attempts)))


def test_the_number_of_an_error_of_the_system_is_kept() -> None:
    assert (FULL.errno, NAN.errno) == (errno.ENOSPC, None)
    assert FULL.message == "cannot save the checkpoint: OSError: [Errno 28] full"
