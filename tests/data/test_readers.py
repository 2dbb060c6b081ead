"""Documents from files of every kind, whole and damaged."""

import gzip
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ext.data import readers
from megatron_ext.data.blocks import Fault
from megatron_ext.data.readers import find_sources, read_blocks, read_documents, source_size
from megatron_ext.errors import DataError

TEXTS = ["one", "two\nlines\u2028é🙂", "", "x" * 3000, ' "quoted"\\ \t']


def json_lines(texts: Sequence[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"id": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts))


def read(path: Path, *keys: str) -> list[str | tuple[str, ...]]:
    """Texts, or ``place: reason`` of what could not be read."""
    found = read_documents([path], keys or ("text",))
    return [f"{d.place}: {d.reason}" if isinstance(d, Fault) else d[0] if len(d) == 1 else d for d in found]


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def save_parquet(path: Path, column: pa.Array, **options: object) -> Path:
    pq.write_table(pa.table({"id": range(len(column)), "text": column}), path, **options)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".JSONL"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(ending).suffix, bytes)
    # An archive may have several members, as one that was written in several goes.
    path = save(tmp_path / f"a{ending}", compress(json_lines(TEXTS[:2])) + compress(json_lines(TEXTS[2:])))
    assert read(path) == TEXTS


def test_last_line_needs_no_newline_and_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    content = json_lines()
    assert read(save(tmp_path / "a.jsonl", content[:-1])) == TEXTS
    assert read(save(tmp_path / "b.jsonl", content.replace(b"\n", b"\r\n"))) == TEXTS


@pytest.mark.parametrize("column", [pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode()])
def test_parquet(tmp_path: Path, column: pa.Array) -> None:
    assert read(save_parquet(tmp_path / "a.parquet", column, row_group_size=2)) == TEXTS


def test_dataset_on_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"id": range(5), "text": TEXTS})
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    assert read(tmp_path / "saved") == TEXTS
    dataset.select([3, 1]).save_to_disk(tmp_path / "selected")
    assert read(tmp_path / "selected") == [TEXTS[3], TEXTS[1]]
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits" / "train") == TEXTS
    with pytest.raises(DataError, match=r"splits: several datasets in one folder, expected one of .*splits/test, .*splits/train"):
        read(tmp_path / "splits")


@pytest.mark.parametrize("ending", [".txt", ".md", "", ".c", ".txt.gz", ".txt.zst"])
def test_plain_text_is_one_document(tmp_path: Path, ending: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(ending).suffix, bytes)
    text = "\n".join(TEXTS)
    assert read(save(tmp_path / f"a{ending}", compress(text.encode()))) == [text]


def test_folder_is_read_in_order_by_ending(tmp_path: Path) -> None:
    (tmp_path / "a" / "z").mkdir(parents=True)
    save(tmp_path / "b.txt", b"b")
    save(tmp_path / "B.txt", b"B")
    save(tmp_path / "c.jsonl", json_lines(["c"]))
    save(tmp_path / ".hidden", b"not read")
    save(tmp_path / "a" / "d.md", b"d")
    save_parquet(tmp_path / "a" / "z" / "e.parquet", pa.array(["e"]))
    datasets.Dataset.from_dict({"text": ["f"]}).save_to_disk(tmp_path / "f")
    assert read(tmp_path) == ["B", "b", "c", "d", "e", "f"]
    assert [document for document in read_documents([tmp_path / "f", tmp_path / "b.txt"])] == [("f",), ("b",)]


def test_several_keys(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"q": "1", "a": "2"}\n{"q": "3"}\n\n')
    assert read(path, "a", "q") == [("2", "1"), "line 2: no key 'a', the record has 'q'", ("", "")]
    pq.write_table(pa.table({"q": ["1"], "a": ["2"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "a", "q") == [("2", "1")]
    assert read(save(tmp_path / "a.txt", b"x"), "a", "q") == [": plain text is one field, expected a file with the keys a, q"]


BAD_LINES = {
    b"{'text': 1}": "bad JSON: Expecting property name enclosed in double quotes at column 2",
    b'{"text": "a': "bad JSON: Unterminated string starting at at column 10",
    b'{"text": "a"} x': "bad JSON: Extra data at column 15",
    b"[" * 100_000: "bad JSON: maximum recursion depth exceeded",
    b'{"n": ' + b"1" * 5000 + b"}": "bad JSON: Exceeds the limit",
    b'["a"]': "list, expected a JSON object with the key text",
    b'{"Text": "a", "n": 1}': "no key 'text', the record has 'Text', 'n'",
    b"{}": "no key 'text', the record has none",
    b'{"text": 12}': "'text' is 12, expected a string",
    b'{"text": null}': "'text' is null, expected a string",
    b'{"text": ["a"]}': "'text' is [\"a\"], expected a string",
    b'{"text": "\xff"}': "invalid UTF-8 at byte 10 (ff 22 7d)",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8 at byte 10 (ed a0 80 22)",
    b'{"text": "ab\\ud800c"}': "'text' is not Unicode text: lone surrogate '\\ud800' at character 2",
    b'\xef\xbb\xbf{"text": "a"}': "bad JSON: Unexpected UTF-8 BOM",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=[reason[:40] for reason in BAD_LINES.values()])
def test_bad_lines_are_named_and_the_others_read(tmp_path: Path, line: bytes) -> None:
    path = save(tmp_path / "a.jsonl", json_lines(["before"]) + line + b"\n" + json_lines(["after"]))
    before, fault, after = read(path)
    assert (before, after) == ("before", "after")
    assert fault.startswith(f"line 2: {BAD_LINES[line]}")
    with_path = next(document for document in read_documents([path]) if isinstance(document, Fault))
    assert str(with_path) == f"{path}, {fault}"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_archive_gives_what_came_before_and_an_error(tmp_path: Path, ending: str, damage: str) -> None:
    rng = random.Random(0)
    texts = [f"{number} {rng.randbytes(20).hex()}" for number in range(20_000)]
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
    content = compress(json_lines(texts))
    half = len(content) // 2
    damaged = content[:half] if damage == "truncated" else content[:half] + bytes(50) + content[half + 50 :]
    path = save(tmp_path / f"a.jsonl{ending}", damaged)
    *found, last = read(path)
    assert last.startswith("line ") and "truncated or damaged, the rest of the file cannot be read" in last
    # Overwritten bytes may decode to something before the decoder notices.
    intact = [text for text, expected in zip(found, texts, strict=False) if text == expected]
    assert len(intact) > 5_000
    assert sum(block.size for block in read_blocks([path], ["text"])) == source_size(path)


def test_truncated_plain_archive(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt.gz", gzip.compress(os.urandom(10_000))[:5_000])
    (fault,) = read(path)
    assert "Truncated compressed stream: truncated, damaged or not readable" in fault


def test_damaged_parquet(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "a.parquet", pa.array([f"{n} {os.urandom(50).hex()}" for n in range(2000)]), row_group_size=500)
    content = path.read_bytes()
    (fault,) = read(save(tmp_path / "cut.parquet", content[: len(content) // 2]))
    assert fault.startswith("row 1: ") and "truncated or damaged" in fault
    *rows, fault = read(
        save(tmp_path / "holed.parquet", content[: len(content) // 2] + bytes(20_000) + content[len(content) // 2 + 20_000 :])
    )
    assert "truncated or damaged" in fault and fault.startswith(f"row {len(rows) + 1}:") and len(rows) >= 500
    (fault,) = read(save(tmp_path / "empty.parquet", b""))
    assert "truncated or damaged" in fault


@pytest.mark.parametrize(
    ("claimed", "kept", "reason"), [(1001, 1000, "row 1001: 1000 rows instead of the 1001"), (999, 768, "row 769: more than the 999 rows")]
)
def test_a_parquet_file_with_other_rows_than_it_says_loses_none_in_silence(tmp_path: Path, claimed: int, kept: int, reason: str) -> None:
    content = save_parquet(tmp_path / "a.parquet", pa.array(["x"] * 1000), row_group_size=500).read_bytes()
    path = save(tmp_path / "b.parquet", content.replace(b"\x16" + varint(1000) + b"\x19", b"\x16" + varint(claimed) + b"\x19", 1))
    *rows, fault = read(path)
    assert len(rows) == kept and fault.startswith(reason)
    assert sum(block.size for block in read_blocks([path], ["text"])) == path.stat().st_size


def varint(number: int) -> bytes:
    """As Thrift's compact protocol writes small positive numbers: zigzag, seven bits a byte."""
    low, high = (2 * number) & 0x7F, (2 * number) >> 7
    return bytes([low | 0x80, high])


def test_a_parquet_column_whose_name_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    content = save_parquet(tmp_path / "a.parquet", pa.array(TEXTS)).read_bytes()
    (fault,) = read(save(tmp_path / "b.parquet", content.replace(b"\x04text", b"\x04te\xff\xff")))
    assert fault.startswith("row 1: 'utf-8' codec can't decode") and "truncated or damaged" in fault


def test_bytes_of_a_damaged_table_are_counted_once(tmp_path: Path) -> None:
    content = save_parquet(tmp_path / "a.parquet", pa.array([os.urandom(50).hex() for _ in range(2000)]), row_group_size=500).read_bytes()
    path = save(tmp_path / "b.parquet", content[: len(content) // 2] + bytes(20_000) + content[len(content) // 2 + 20_000 :])
    sizes = [block.size for block in read_blocks([path], ["text"])]
    assert len(sizes) > 2 and min(sizes) > 0 and sum(sizes) == path.stat().st_size


def test_bad_rows_and_columns_of_tables(tmp_path: Path) -> None:
    not_utf8 = pa.array([b"ok", b"\xff\xfe", None, b"end"]).view(pa.string())
    expected = ["ok", "row 2: 'text': invalid UTF-8 at byte 0 (ff fe)", "row 3: 'text' is null, expected a string", "end"]
    assert read(save_parquet(tmp_path / "a.parquet", not_utf8)) == expected
    assert read(tmp_path / "a.parquet", "body") == [": no column 'body', the table has 'id', 'text'"]
    assert read(tmp_path / "a.parquet", "id") == [": column 'id' is int64, expected strings"]
    datasets.Dataset.from_dict({"text": ["a", None], "n": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["a", "row 2: 'text' is null, expected a string"]
    assert read(tmp_path / "saved", "n") == [": column 'n' is int64, expected strings"]


def test_damaged_dataset_on_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size // 2)
    (fault,) = read(tmp_path / "saved")
    assert "truncated or damaged" in fault
    arrow.unlink()
    (fault,) = read(tmp_path / "saved")
    assert "truncated or damaged" in fault


def test_plain_text_that_is_none(tmp_path: Path) -> None:
    assert read(save(tmp_path / "a.txt", b"one\ntwo\n\xe9\n")) == ["line 3: invalid UTF-8 at byte 8 (e9 0a), expected plain text"]
    (fault,) = read(save(tmp_path / "a.tar.gz", gzip.compress(b"x")))
    assert "files like a.tar.gz are not read, accepted: .jsonl" in fault


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: no such file or folder, accepted: \.jsonl"):
        find_sources([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: an empty folder"):
        find_sources([tmp_path / "empty"])
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"loop: a broken link, a link to a folder above it"):
        find_sources([tmp_path])


def test_lines_longer_than_a_block_and_blocks_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [letter * size for letter, size in zip("abcdefgh", (0, 1, 5, 300, 2, 64, 1000, 3), strict=True)]
    path = save(tmp_path / "a.jsonl", json_lines(texts) + b"bad\n")
    for block_bytes, read_bytes in ((1, 1), (64, 7), (64, 100), (1 << 20, 1 << 16)):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(readers, "READ_BYTES", read_bytes)
        assert read(path) == [*texts, "line 9: bad JSON: Expecting value at column 1"]
        assert sum(block.size for block in read_blocks([path], ["text"])) == source_size(path)


def test_blocks_stay_small(tmp_path: Path) -> None:
    """However large the input, what is held at once is a block."""
    json_path = save(tmp_path / "a.jsonl.zst", zstandard.compress(json_lines(["x" * 1000] * 20_000)))
    largest = max(len(block.content) for block in read_blocks([json_path], ["text"]))
    assert json_path.stat().st_size < largest < readers.BLOCK_BYTES + readers.READ_BYTES + 2000
    parquet = save_parquet(tmp_path / "a.parquet", pa.array(["x"] * 5000))
    assert max(len(block.columns[0]) for block in read_blocks([parquet], ["text"])) <= readers.ROWS


@pytest.mark.parametrize(
    "make", [lambda p: save(p / "a.jsonl", json_lines()), lambda p: save_parquet(p / "a.parquet", pa.array(TEXTS * 300))]
)
def test_sizes_of_blocks_sum_to_the_file(tmp_path: Path, make: object) -> None:
    path = make(tmp_path)
    assert sum(block.size for block in read_blocks([path], ["text"])) == source_size(path) == path.stat().st_size
