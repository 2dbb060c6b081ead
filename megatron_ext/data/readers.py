"""Documents from JSON lines, Parquet, plain text, folders of those, and Hugging Face datasets on disk."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_ext.data.blocks import TEXT, Block, BrokenBlock, Fault, JsonLinesBlock, PlainTextBlock, RowsBlock
from megatron_ext.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
REFUSED = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".arrow", ".bin", ".idx", ".safetensors")
ACCEPTED = ".jsonl, .json, .ndjson (each alone or with .gz or .zst), .parquet, any other ending as plain text, or a dataset folder"
BLOCK_BYTES = 1 << 20
READ_BYTES = 1 << 16  # what a damaged archive can take with it
ROWS = 256


def read_documents(inputs: Sequence[str | Path], keys: Sequence[str] = ("text",)) -> Iterator[TEXT | Fault]:
    """The texts of all documents, in a fixed order, with a fault in the place of each document that cannot be read.

    Args:
        inputs: files and folders. A folder gives its files by name, then its folders by name, without names that begin with a dot; a folder
            saved by ``datasets`` gives its rows. A plain text file is one document.
        keys: fields of a record to read.

    Raises:
        DataError: an input does not exist, is an empty folder, or is a folder of several datasets.
    """
    for block in read_blocks(find_sources(inputs), keys):
        yield from block.documents(keys)


def find_sources(inputs: Sequence[str | Path]) -> list[Path]:
    """Files and dataset folders among and under ``inputs``, in the order in which they are read. Raises DataError as ``read_documents``."""
    sources: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder, accepted: {ACCEPTED}")
        found = list(_walk(path, frozenset()))
        if not found:
            raise DataError(f"{path}: an empty folder, accepted: {ACCEPTED}")
        sources += found
    return sources


def source_size(source: Path) -> int:
    """Bytes of a file, or of the files of a dataset folder."""
    files = [source] if source.is_file() else source.iterdir()
    return sum(file.stat().st_size for file in files)


def read_blocks(sources: Sequence[Path], keys: Sequence[str]) -> Iterator[Block]:
    """Cut sources into blocks. Memory is bounded by a block and the longest document."""
    for source in sources:
        yield from _reader(source)(source, keys)


def _walk(path: Path, above: frozenset[Path]) -> Iterator[Path]:
    if path.is_file() or _is_dataset(path):
        yield path
        return
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(state.parent) for state in sorted(path.glob("*/state.json")))
        raise DataError(f"{path}: several datasets in one folder, expected one of {splits}")
    if not path.is_dir() or path.resolve() in above:
        raise DataError(f"{path}: a broken link, a link to a folder above it, or no regular file")
    entries = sorted((entry for entry in path.iterdir() if not entry.name.startswith(".")), key=lambda entry: (entry.is_dir(), entry.name))
    for entry in entries:
        yield from _walk(entry, above | {path.resolve()})


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _reader(source: Path) -> Callable[[Path, Sequence[str]], Iterator[Block]]:
    ending = source.suffix.lower()
    inner = source.with_suffix("").suffix.lower() if ending in COMPRESSIONS else ending
    if source.is_dir():
        return _read_dataset
    if ending == ".parquet":
        return _read_parquet
    if inner in REFUSED:
        return _refuse
    return _read_json_lines if inner in JSON_LINES else _read_plain_text


def _refuse(source: Path, keys: Sequence[str]) -> Iterator[Block]:
    yield _broken(source, 0, "", f"files like {source.name} are not read, accepted: {ACCEPTED}")


def _read_json_lines(source: Path, keys: Sequence[str]) -> Iterator[Block]:
    line, position = 1, 0
    with open(source, "rb") as file:
        stream = _open_stream(source, file)
        try:
            for content in _whole_lines(stream):
                yield JsonLinesBlock(str(source), file.tell() - position, line, content)
                line += content.count(b"\n")
                position = file.tell()
        except OSError as error:
            yield _broken(source, position, f"line {line}", f"{error}: truncated or damaged, the rest of the file cannot be read")


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Blocks that end where a line ends; after an error, whatever whole lines came before it."""
    parts: list[bytes] = []
    waiting = 0
    try:
        while piece := stream.read(READ_BYTES):
            cut = piece.rfind(b"\n") + 1
            waiting += len(piece)
            if not cut or waiting < BLOCK_BYTES:
                parts.append(piece)
                continue
            yield b"".join((*parts, piece[:cut]))
            parts, waiting = [piece[cut:]], len(piece) - cut
    except OSError:
        rest = b"".join(parts)
        yield rest[: rest.rfind(b"\n") + 1]
        raise
    yield b"".join(parts)


def _read_plain_text(source: Path, keys: Sequence[str]) -> Iterator[Block]:
    size = source.stat().st_size
    try:
        with open(source, "rb") as file:
            content = _open_stream(source, file).read()
    except OSError as error:
        yield _broken(source, 0, "", f"{error}: truncated, damaged or not readable")
    else:
        yield PlainTextBlock(str(source), size, content)


def _open_stream(source: Path, file: IO[bytes]) -> IO[bytes]:
    """The decompressed contents of an open file. pyarrow reports a truncated archive, which zstandard's own reader does not."""
    compression = COMPRESSIONS.get(source.suffix.lower())
    if compression is None or source.stat().st_size == 0:
        return file
    return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(file), compression))


def _read_parquet(source: Path, keys: Sequence[str]) -> Iterator[Block]:
    rows = _Rows(source, keys)
    try:
        # A buffer size makes the reader stream pages; without it, it loads whole row groups.
        with closing(pq.ParquetFile(source, buffer_size=BLOCK_BYTES, pre_buffer=False)) as file:
            _check_columns(file.schema_arrow, keys)
            yield from rows.blocks(file.iter_batches(ROWS, columns=list(keys), use_threads=False), file.metadata.num_rows)
    except _WrongColumns as error:
        yield rows.broken("", str(error))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield rows.broken(f"row {rows.next}", f"{error}: truncated or damaged, the rest of the file cannot be read")


def _read_dataset(source: Path, keys: Sequence[str]) -> Iterator[Block]:
    import datasets  # slow to import, and only needed here

    rows = _Rows(source, keys)
    try:
        table = datasets.load_from_disk(str(source), keep_in_memory=False)
        _check_columns(table.features.arrow_schema, keys)
        yield from rows.blocks(table.select_columns(list(keys)).with_format("arrow").iter(ROWS), len(table))
    except _WrongColumns as error:
        yield rows.broken("", str(error))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        yield rows.broken(f"row {rows.next}", f"{error}: truncated or damaged, the rest of the dataset cannot be read")


class _WrongColumns(Exception):
    """A table without the columns that were asked for."""


class _Rows:
    """Cuts a table into blocks, and counts the rows and the bytes of its files that they stand for."""

    def __init__(self, source: Path, keys: Sequence[str]) -> None:
        self._source, self._keys = source, keys
        self._size, self._read = source_size(source), 0
        self.next = 1
        """The row that is read next."""

    def blocks(self, batches: Iterable[pa.RecordBatch | pa.Table], claimed: int) -> Iterator[Block]:
        """A block for each of ``batches``, which have the ``claimed`` number of rows together.

        Raises:
            pa.ArrowInvalid: they have more or fewer.
        """
        for batch in batches:
            last = self.next - 1 + batch.num_rows
            if last > claimed:
                raise pa.ArrowInvalid(f"more than the {claimed} rows that it says it has")
            read = self._size * last // max(claimed, 1)
            yield RowsBlock(str(self._source), read - self._read, self.next, _columns(batch, self._keys))
            self.next, self._read = last + 1, read
        if self.next - 1 < claimed:
            raise pa.ArrowInvalid(f"{self.next - 1} rows instead of the {claimed} that it says it has")

    def broken(self, place: str, reason: str) -> BrokenBlock:
        """For what was not read, which is all that is left."""
        return _broken(self._source, self._read, place, reason)


def _check_columns(schema: pa.Schema, keys: Sequence[str]) -> None:
    for key in keys:
        if key not in schema.names:
            raise _WrongColumns(f"no column {key!r}, the table has {', '.join(map(repr, schema.names))}")
        kind = schema.field(key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise _WrongColumns(f"column {key!r} is {kind}, expected strings")


def _columns(batch: pa.RecordBatch | pa.Table, keys: Sequence[str]) -> tuple[list[bytes | None], ...]:
    """Undecoded bytes, so that one row that is not UTF-8 does not fail the others."""
    return tuple(batch.column(key).cast(pa.large_binary()).to_pylist() for key in keys)


def _broken(source: Path, read: int, place: str, reason: str) -> BrokenBlock:
    return BrokenBlock(str(source), source_size(source) - read, Fault(str(source), place, reason))
