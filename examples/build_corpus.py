#!/usr/bin/env python3
"""Build two small corpora of different kinds from the standard library of the Python that runs this, or from an installed package.

    python examples/build_corpus.py --output corpus
    python examples/build_corpus.py --package sympy --output other_corpus

writes prose.train.jsonl and prose.valid.jsonl (docstrings, one module a document), and code.train.jsonl and code.valid.jsonl (the same
modules without docstrings and comments). A module is held out for validation in both or in neither. Code lines that share 50 characters in
a row with any of the prose are left out, so that a model can learn nothing of one corpus from the other.
"""

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_ext.atomic_io import atomic_open

EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # generated tables
}
SHARED_SPAN = 50
HASH_BASE = 0x9E3779B97F4A7C15  # odd, with well mixed bits
VALIDATION_PERCENT = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the four files; made if missing")
    parser.add_argument("--package", metavar="NAME", help="an installed package to read instead of the standard library")
    options = parser.parse_args(arguments)
    library = Path(sysconfig.get_path("stdlib")) if options.package is None else folder_of(options.package, parser)
    options.output.mkdir(parents=True, exist_ok=True)
    prose, code = build(library)
    for kind, documents in (("prose", prose), ("code", code)):
        for split, held_out in (("train", False), ("valid", True)):
            chosen = {path: text for path, text in documents.items() if is_held_out(path) == held_out}
            write_documents(options.output / f"{kind}.{split}.jsonl", chosen)


def folder_of(package: str, parser: argparse.ArgumentParser) -> Path:
    """Where an installed package lies; ends the program with a message if there is none. The package is not imported."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        parser.error(f"--package {package}: accepted is the name of an installed package, such as sympy")
    return Path(found.submodule_search_locations[0])


def build(library: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Prose and code by module path, e.g. "json/decoder.py"; a module without any is left out."""
    prose, code = {}, {}
    for path in find_modules(library):
        with tokenize.open(path) as file:
            source = file.read()
        name = path.relative_to(library).as_posix()
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning | DeprecationWarning):
            try:
                tree = ast.parse(source)
            except SyntaxError as error:
                print(f"left out {path}: this Python cannot read line {error.lineno}: {error.msg}", file=sys.stderr)
                continue
        prose[name] = documentation(tree)
        code[name] = bare_code(source, tree)
    prose = {name: text for name, text in prose.items() if text}
    code = without_shared_lines(code, prose.values())
    return prose, {name: text for name, text in code.items() if text}


def find_modules(library: Path) -> list[Path]:
    """Modules of the library, sorted by path, without tests, generated tables and installed packages."""
    paths = (path for path in library.rglob("*.py") if not EXCLUDED_FOLDERS & set(path.relative_to(library).parts))
    return sorted(path for path in paths if not path.name.startswith("_sysconfigdata"))


def is_held_out(name: str) -> bool:
    """Whether a module is for validation, in both corpora."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < VALIDATION_PERCENT


def documentation(tree: ast.Module) -> str:
    """All docstrings of a module, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node, _ in blocks(tree) if isinstance(node, documented))
    return "\n\n".join(text.strip() for text in docstrings if text and text.strip())


def blocks(node: ast.AST) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Blocks of statements under a node, top to bottom, each with its owner."""
    for field in ("body", "handlers", "cases", "orelse", "finalbody"):
        children = getattr(node, field, [])
        if field not in ("handlers", "cases") and children:
            yield node, children
        for child in children:
            yield from blocks(child)


def bare_code(source: str, tree: ast.Module) -> str:
    """A module's source as it is formatted, without comments and without strings that stand alone, as docstrings do."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # ast counts columns in bytes
    for comment in comments(source):
        line, column = comment.start
        begin = len(comment.line[:column].encode())
        lines[line - 1] = lines[line - 1][:begin].rstrip() + b"\n"
    for statement, is_only in reversed(list(lone_strings(tree))):
        first, last = statement.lineno - 1, statement.end_lineno - 1
        after = lines[last][statement.end_col_offset :]
        replacement = b"pass" if is_only or after.strip() else b""
        lines[first] = lines[first][: statement.col_offset] + replacement + after
        lines[first + 1 : last + 1] = [b""] * (last - first)
    return tidy(b"".join(lines).decode())


def comments(source: str) -> Iterator[tokenize.TokenInfo]:
    """Comment tokens of a module."""
    return (token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT)


def lone_strings(tree: ast.Module) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements that are only a string, top to bottom, and whether a block would be empty without this one."""
    for owner, statements in blocks(tree):
        strings = [statement for statement in statements if is_lone_string(statement)]
        empties = len(strings) == len(statements) and not isinstance(owner, ast.Module)
        yield from ((statement, empties and number == 0) for number, statement in enumerate(strings))


def is_lone_string(statement: ast.stmt) -> bool:
    """Whether a statement is nothing but a string."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


def tidy(code: str) -> str:
    """No spaces at the ends of lines, two blank lines in a row at most, none at the beginning."""
    code = re.sub(r"[ \t\f]+$", "", code, flags=re.MULTILINE)
    code = re.sub(r"\n{4,}", "\n\n\n", code).strip("\n")
    return code + "\n" if code else ""


def without_shared_lines(texts: dict[str, str], others: Iterable[str]) -> dict[str, str]:
    """The texts without the lines that touch a span of ``SHARED_SPAN`` characters that is also in one of the others."""
    foreign = np.sort(np.concatenate([span_hashes(other) for other in others]))
    while True:  # dropping a line makes neighbours of others
        own = np.sort(np.concatenate([span_hashes(text) for text in texts.values()]))
        shared = own[_is_among(foreign, own)]
        if not len(shared):
            return texts
        texts = {name: _drop_lines(text, np.flatnonzero(_is_among(shared, span_hashes(text)))) for name, text in texts.items()}


def _is_among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is one of the ordered ones, bool [values]."""
    places = np.searchsorted(ordered, values)
    return ordered[np.minimum(places, len(ordered) - 1)] == values


def _drop_lines(text: str, spans: np.ndarray) -> str:
    """``text`` without the lines that touch the spans that begin at the given characters, in rising order."""
    if not len(spans):
        return text
    kept, begin = [], 0
    for line in text.splitlines(keepends=True):
        end = begin + len(line)
        if np.searchsorted(spans, begin - SHARED_SPAN + 1) == np.searchsorted(spans, end):
            kept.append(line)
        begin = end
    return tidy("".join(kept))


def span_hashes(text: str) -> np.ndarray:
    """A hash for each span of ``SHARED_SPAN`` characters, uint64 [spans]: a polynomial in the characters, modulo 2**64."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    hashes = np.zeros(max(len(text) - SHARED_SPAN + 1, 0), dtype=np.uint64)
    for offset in range(SHARED_SPAN):
        hashes = hashes * np.uint64(HASH_BASE) + characters[offset : offset + len(hashes)]
    return hashes


def write_documents(path: Path, documents: dict[str, str]) -> None:
    """Write one JSON object a line and print what was written."""
    with atomic_open(path) as file:
        for name, text in documents.items():
            file.write(json.dumps({"text": text, "path": name}) + "\n")
    lengths = [len(text) for text in documents.values()]
    longest = max(lengths, default=0)
    print(f"{path}: {len(lengths):,} documents, {sum(lengths):,} characters, longest {longest:,}")


if __name__ == "__main__":
    main()
