"""Megatron's .bin/.idx format: the same bytes as megatron-core writes, and every damage is named."""

import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_ext.data.indexed import HEADER, IndexedDataset
from megatron_ext.data.indexed_writer import IndexedDatasetWriter, merge
from megatron_ext.errors import DataError

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """megatron-core's own implementation of the format."""
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def some_documents(dtype: type = np.uint16) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    return [rng.integers(0, top, size, dtype=dtype, endpoint=True) for size in (3, 0, 1000, 1, 7)]


def write(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def build_with_megatron(megatron: ModuleType, prefix: Path, documents: list[list[np.ndarray]], dtype: type = np.uint16) -> Path:
    """Documents of several sequences each."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = np.concatenate(sequences).astype(np.int64)
        builder.add_document(torch.from_numpy(tokens), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_as_megatron_writes(tmp_path: Path, megatron: ModuleType, dtype: type) -> None:
    documents = some_documents(dtype)
    ours = write(tmp_path / "ours", documents, dtype)
    theirs = build_with_megatron(megatron, tmp_path / "theirs", [[document] for document in documents], dtype)
    assert contents(ours) == contents(theirs)


def test_megatron_reads_what_was_written(tmp_path: Path, megatron: ModuleType) -> None:
    documents = some_documents()
    read = megatron.IndexedDataset(str(write(tmp_path / "ours", documents)))
    assert len(read) == len(documents)
    for expected, found in zip(documents, read, strict=True):
        np.testing.assert_array_equal(expected, found)


def test_reads_what_megatron_wrote_with_documents_of_several_sequences(tmp_path: Path, megatron: ModuleType) -> None:
    first, second, third, fourth, fifth = some_documents()
    dataset = IndexedDataset(build_with_megatron(megatron, tmp_path / "theirs", [[first, second, third], [fourth, fifth]]))
    assert len(dataset) == 2
    assert dataset.lengths.tolist() == [1003, 8] and dataset.lengths.dtype == np.int64
    np.testing.assert_array_equal(dataset.tokens(0), np.concatenate([first, second, third]))
    np.testing.assert_array_equal(dataset.tokens(1), np.concatenate([fourth, fifth]))


def test_part_of_a_document_is_a_read_only_view(tmp_path: Path) -> None:
    documents = some_documents()
    dataset = IndexedDataset(write(tmp_path / "set", documents))
    part = dataset.tokens(2, 10, 20)
    np.testing.assert_array_equal(part, documents[2][10:20])
    assert part.dtype == np.uint16 and part.base is not None and not part.flags.writeable
    assert [len(dataset.tokens(number)) for number in range(5)] == [3, 0, 1000, 1, 7]
    assert dataset.num_tokens == 1011
    for arguments in ((5,), (-1,), (0, 2, 1), (0, 0, 4), (0, -1, 2)):
        with pytest.raises(IndexError):
            dataset.tokens(*arguments)


def test_set_without_documents(tmp_path: Path, megatron: ModuleType) -> None:
    ours = write(tmp_path / "ours", [])
    assert contents(ours) == contents(build_with_megatron(megatron, tmp_path / "theirs", []))
    dataset = IndexedDataset(ours)
    assert len(dataset) == dataset.num_tokens == len(dataset.lengths) == 0


def test_add_many_equals_add(tmp_path: Path) -> None:
    documents = some_documents()
    with IndexedDatasetWriter(tmp_path / "many", np.uint16) as writer:
        writer.add_many(np.concatenate(documents), np.array([len(document) for document in documents]))
    assert contents(tmp_path / "many") == contents(write(tmp_path / "one", documents))


def test_dataset_can_be_sent_to_another_process(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "set", some_documents()))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).tokens(2), dataset.tokens(2))


def test_fingerprint_follows_the_documents(tmp_path: Path) -> None:
    documents = some_documents()
    first = IndexedDataset(write(tmp_path / "a", documents)).fingerprint()
    assert IndexedDataset(write(tmp_path / "b", documents)).fingerprint() == first
    assert IndexedDataset(write(tmp_path / "c", documents[::-1])).fingerprint() != first
    assert IndexedDataset(write(tmp_path / "d", documents[:1])).fingerprint() != first


def test_merge_equals_writing_all_documents(tmp_path: Path, megatron: ModuleType) -> None:
    documents = some_documents()
    several = [[documents[2], documents[0]], [documents[4]]]
    sources = [write(tmp_path / "a", documents), build_with_megatron(megatron, tmp_path / "b", several), write(tmp_path / "c", [])]
    merge(tmp_path / "merged", sources)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for source in sources:
        builder.add_index(str(source))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert contents(tmp_path / "merged") == contents(tmp_path / "theirs")
    assert IndexedDataset(tmp_path / "merged").lengths.tolist() == [3, 0, 1000, 1, 7, 1003, 7]


def test_merge_refuses_different_dtypes_and_nothing(tmp_path: Path) -> None:
    sources = [write(tmp_path / "a", some_documents()), write(tmp_path / "b", some_documents(np.int32), np.int32)]
    with pytest.raises(DataError, match=r"b\.idx.*int32.*uint16"):
        merge(tmp_path / "merged", sources)
    with pytest.raises(DataError, match="nothing to merge"):
        merge(tmp_path / "merged", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_index_is_handled_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = some_documents() * 3
    expected = contents(write(tmp_path / "whole", documents))
    monkeypatch.setattr("megatron_ext.data.indexed.CHUNK", 4)
    monkeypatch.setattr("megatron_ext.data.indexed_writer.CHUNK", 4)
    assert contents(write(tmp_path / "chunks", documents)) == expected
    dataset = IndexedDataset(tmp_path / "chunks")
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    merge(tmp_path / "merged", [tmp_path / "chunks"])
    assert contents(tmp_path / "merged") == expected


def replace_bytes(path: Path, offset: int, new: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:offset] + new + old[offset + len(new) :])


SEQUENCES = HEADER.size
POINTERS = SEQUENCES + 4 * 5
BOUNDARIES = POINTERS + 8 * 5
DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing bin": (lambda tokens, index: tokens.unlink(), r"set\.bin: No such file"),
    "missing idx": (lambda tokens, index: index.unlink(), r"set\.idx: No such file"),
    "empty idx": (lambda tokens, index: os.truncate(index, 0), r"set\.idx: 0 bytes, expected a header of 34"),
    "truncated header": (lambda tokens, index: os.truncate(index, 20), r"set\.idx: 20 bytes"),
    "truncated idx": (lambda tokens, index: os.truncate(index, 100), r"set\.idx: 100 bytes, expected 142 for 5 sequences and 6"),
    "truncated bin": (lambda tokens, index: os.truncate(tokens, 2000), r"set\.bin: 2000 bytes, expected 2022"),
    "half a token": (lambda tokens, index: os.truncate(tokens, 2021), r"set\.bin: 2021 bytes, expected a multiple of 2"),
    "longer bin": (lambda tokens, index: tokens.write_bytes(bytes(2024)), r"set\.bin: 2024 bytes, expected 2022"),
    "longer idx": (lambda tokens, index: index.write_bytes(index.read_bytes() + b"x"), r"set\.idx: 143 bytes, expected 142"),
    "other file": (lambda tokens, index: index.write_bytes(b"\x93NUMPY" + bytes(200)), r"set\.idx: starts with b'\\x93NUMPY"),
    "other version": (lambda tokens, index: replace_bytes(index, 9, struct.pack("<Q", 2)), r"version 2, expected .* version 1"),
    "float32": (lambda tokens, index: replace_bytes(index, 17, b"\x07"), r"dtype code 7 \(float32\).*accepted: 1 \(uint8\)"),
    "float64": (lambda tokens, index: replace_bytes(index, 17, b"\x06"), r"dtype code 6 \(float64\)"),
    "unknown dtype": (lambda tokens, index: replace_bytes(index, 17, b"\x63"), r"dtype code 99"),
    "other dtype": (lambda tokens, index: replace_bytes(index, 17, b"\x04"), r"set\.bin: 2022 bytes, expected a multiple of 4"),
    "huge count": (lambda tokens, index: replace_bytes(index, 18, b"\xff" * 8), r"set\.idx: 142 bytes, expected"),
    "multimodal": (lambda tokens, index: index.write_bytes(index.read_bytes() + bytes(5)), r"sequence modes \(multimodal data\)"),
    "negative length": (lambda tokens, index: replace_bytes(index, SEQUENCES, struct.pack("<i", -3)), r"sequence 0 has -3 tokens"),
    "wrong length": (
        lambda tokens, index: replace_bytes(index, SEQUENCES + 8, struct.pack("<i", 999)),
        r"sequence 3 .*at byte 2004",
    ),
    "wrong pointer": (
        lambda tokens, index: replace_bytes(index, POINTERS + 16, struct.pack("<q", 8)),
        r"sequence 2 .* at byte 8,",
    ),
    "first boundary": (lambda tokens, index: replace_bytes(index, BOUNDARIES, struct.pack("<q", 1)), r"boundaries are 1 to 5"),
    "last boundary": (lambda tokens, index: replace_bytes(index, BOUNDARIES + 40, struct.pack("<q", 4)), r"boundaries are 0 to 4"),
    "falling boundary": (lambda tokens, index: replace_bytes(index, BOUNDARIES + 8, struct.pack("<q", 3)), r"expected to rise from 0 to 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "set", some_documents())
    apply, message = DAMAGES[damage]
    apply(tmp_path / "set.bin", tmp_path / "set.idx")
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "set")


@pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.uint64, "U4"])
def test_writer_refuses_other_dtypes(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(DataError, match="cannot be stored as token ids, accepted: uint8"):
        IndexedDatasetWriter(tmp_path / "set", dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [[-1], [65536]])
def test_writer_refuses_ids_that_do_not_fit(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(DataError, match=r"do not fit uint16, which holds 0 to 65535"):
        write(tmp_path / "set", [np.array(bad)])
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_set(tmp_path: Path) -> None:
    write(tmp_path / "set", some_documents())
    before = contents(tmp_path / "set")
    with pytest.raises(RuntimeError, match="stop"), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add(np.arange(5))
        raise RuntimeError("stop")
    assert contents(tmp_path / "set") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]


def test_old_index_never_stands_beside_a_new_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two renames must not leave a pair that opens: here both sets have files of the same sizes."""
    write(tmp_path / "set", [np.array([1, 2])])
    rename = os.replace

    def crash_at_index(source: Path, target: Path) -> None:
        if str(target).endswith(".idx"):
            raise OSError("power cut")
        rename(source, target)

    monkeypatch.setattr("megatron_ext.data.indexed_writer.os.replace", crash_at_index)
    with pytest.raises(OSError, match="power cut"):
        write(tmp_path / "set", [np.array([3, 4])])
    with pytest.raises(DataError, match=r"set\.idx: No such file"):
        IndexedDataset(tmp_path / "set")


def test_two_processes_cannot_write_one_set(tmp_path: Path) -> None:
    program = "import sys; from megatron_ext.data.indexed_writer import IndexedDatasetWriter as W; W(sys.argv[1], 'u2')"
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add(np.arange(5))
        other = subprocess.run([sys.executable, "-c", program, tmp_path / "set"], capture_output=True, text=True)
        assert other.returncode and "another process is writing this file" in other.stderr
    assert IndexedDataset(tmp_path / "set").tokens(0).tolist() == [0, 1, 2, 3, 4]
