"""A few spoilt files of every format; ``tools/fuzz.py`` makes as many as one likes."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.errors import DataError
from tests.fuzz.target import CPU_SECONDS, Hang, Instance, Target, limited
from tests.fuzz.targets import TARGETS

SLOW = {"tokenizer": 20, "study": 60, "checkpoint": 60, "safetensors": 100, "model_index": 100}
"""Cases of formats of which a case takes long; of the others there are 150."""

PLAIN = 1
"""A seed that draws no overrides for a configuration, which may be spoilt too."""


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_files_load_or_are_refused_by_name(name: str, tmp_path: Path) -> None:
    instance = Instance(TARGETS[name], tmp_path)
    assert instance.load(Random(PLAIN)) == "loaded", "what is not spoilt is accepted"
    outcomes = set()

    @settings(max_examples=SLOW.get(name, 150), derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def spoil(random: Random) -> None:
        outcomes.add(instance.case(random))

    spoil()
    assert outcomes - {"loaded"}, "some are refused"


def _reader(load: Callable[[bytes], None]) -> Target:
    return Target(
        lambda folder: (folder / "file").write_bytes(b"0") and None,
        {"file": lambda random, content: b"1"},
        lambda folder, random: load((folder / "file").read_bytes()),
    )


def _allocates(content: bytes) -> None:
    bytearray(int(content) << 40)


def _hides_its_file(content: bytes) -> None:
    if content != b"0":
        raise DataError("something is wrong")


def _stumbles(content: bytes) -> None:
    {b"0": None}[content]


@pytest.mark.parametrize(("load", "error"), [(_allocates, MemoryError), (_hides_its_file, AssertionError), (_stumbles, KeyError)])
def test_a_reader_that_breaks_the_rules_is_found(load: Callable[[bytes], None], error: type[Exception]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(error):
        instance = Instance(_reader(load), Path(folder))
        assert instance.load(Random(0)) == "loaded"
        for seed in range(20):
            _only_contents(instance, seed)


def _only_contents(instance: Instance, seed: int) -> None:
    """A case; that the file is missing or a folder is what these readers do not expect either."""
    try:
        instance.case(Random(seed))
    except OSError:
        return


def test_a_reader_that_does_not_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.target.CPU_SECONDS", 0.05)
    with pytest.raises(Hang), limited():
        while True:
            pass
    assert CPU_SECONDS > 1
