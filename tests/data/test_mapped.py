"""Files that change while they are mapped, or claim more than they have."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.indexed_writer import IndexedDatasetWriter
from megatron_ext.data.mapped import Float32File, MappedFile
from megatron_ext.errors import DataError


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_pair_that_shrinks_is_an_error_and_not_the_end_of_the_process(tmp_path: Path, ending: str) -> None:
    with IndexedDatasetWriter(tmp_path / "pair", np.dtype("uint16")) as writer:
        for _ in range(3000):
            writer.add(np.arange(7, dtype=np.uint16))
    dataset = IndexedDataset(tmp_path / "pair")
    assert dataset.tokens(2999).tolist() == list(range(7))
    os.truncate(tmp_path / f"pair{ending}", 100)
    with pytest.raises(DataError, match=rf"pair\{ending}: 100 bytes, but \d+ when it was opened"):
        dataset.tokens(2999)


def test_an_array_that_shrinks_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(10_000, dtype=np.float32))
    file = Float32File(str(tmp_path / "a.npy"), 10_000, "numbers")
    assert file.values.sum() == 10_000
    os.truncate(tmp_path / "a.npy", 200)
    with pytest.raises(DataError, match="200 bytes, but 40128 when"):
        _ = file.values


@pytest.mark.parametrize("shape", [(2**62,), (3, 3), (), (-1,), (9,)])
def test_an_array_of_another_shape_is_refused_and_not_made(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(bytes(40))
    with pytest.raises(DataError, match=r"a\.npy: .*accepted: ten numbers"):
        Float32File(str(path), 10, "ten numbers")


@pytest.mark.parametrize(
    "header", [b"{'descr': '<f4', ", b"{}", b"[" * 5000, b"\0" * 20, b"{'descr': '|O', 'fortran_order': False, 'shape': (9,)}"]
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(40))
    with pytest.raises(DataError, match=r"a\.npy: "):
        Float32File(str(tmp_path / "a.npy"), 10, "ten numbers")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(DataError, match="accepted: a file"):
            MappedFile(path, "a file")
