"""Metadata of documents as tokens that stand before them and are not predicted (Gao et al. 2025, "Metadata Conditioning Accelerates
Language Model Pre-training", arXiv:2501.01956)."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.options import SourceOptions
from megatron_ext.errors import DataError


def read_metadata(options: SourceOptions, documents: int) -> IndexedDataset:
    """The metadata of a source, a row of tokens for each of its documents; a row may be empty.

    Raises:
        DataError: the pair cannot be read or has another number of rows.
    """
    assert options.metadata is not None, "asked for by the caller"
    rows = IndexedDataset(options.metadata)
    if len(rows) != documents:
        raise DataError(
            f"{options.metadata}.idx has {len(rows):,} rows of metadata; accepted: {documents:,}, one for each document of {options.path} "
            f"(source {options.name!r})"
        )
    return rows


@dataclass(frozen=True)
class MetadataTemplate:
    """Text of a document's metadata with the names of fields of its record in braces, such as ``"URL: {url}\\n\\n"``.

    Raises:
        DataError: there is no field, or one that is not a plain name.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise DataError(f"metadata {self.text!r}: {error}; accepted: text with names of fields in braces") from error
        plain = all(name and not spec and not conversion and not set(name) & set(".[") for name, spec, conversion in parts)
        if not parts or not plain:
            raise DataError(f"metadata {self.text!r}; accepted: text with at least one name of a field in braces, such as {{url}}")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it needs, in order, each once."""
        return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.text) if name))

    def fill(self, values: Sequence[str]) -> str:
        """The metadata of a record with these values of ``fields``; empty where one of them is blank."""
        if not all(value.strip() for value in values):
            return ""
        return self.text.format(**dict(zip(self.fields, values, strict=True)))
