"""The tools from documents to tokens, as a user calls them."""

import gzip
import importlib
import io
import json
import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ext.data.indexed import IndexedDataset

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXTS = ["def f(x):\n    return x  # é\n", "", "some text\n\nand more text"]


@dataclass
class Done:
    """What a tool left: exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


def run(tool: str, *arguments: object) -> Done:
    """Call the main function of a tool."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = importlib.import_module(f"tools.{tool}").main([str(argument) for argument in arguments])
    return Done(status, output.getvalue(), errors.getvalue())


def run_well(tool: str, *arguments: object) -> str:
    done = run(tool, *arguments)
    assert done.status == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and a tokenizer that was trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text, "title": f"title {number}"}) + "\n" for number, text in enumerate(TEXTS))
    (folder / "good.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "bad.jsonl").write_text(lines + "nonsense\n" + '{"body": 1}\n')
    (folder / "plain.txt").write_text(TEXTS[0])
    output = run_well("train_tokenizer", "--input", folder / "good.jsonl.gz", "--vocab-size", 290, "--output", folder / "tokenizer")
    assert output == f"{folder}/tokenizer: tokenizer of 290 tokens\n"
    return folder


def test_documents_to_tokens(folder: Path, tmp_path: Path) -> None:
    common = ("--input", folder / "good.jsonl.gz", folder / "plain.txt", "--tokenizer", folder / "tokenizer")
    output = run_well("preprocess_data", *common, "--output", tmp_path / "new" / "a", "--workers", 2)
    dataset = IndexedDataset(tmp_path / "new" / "a_text_document")
    reference = AutoTokenizer.from_pretrained(folder / "tokenizer")
    expected = [[*reference(text)["input_ids"], reference.eos_token_id] for text in (TEXTS[0], TEXTS[2], TEXTS[0])]
    assert [dataset.tokens(number).tolist() for number in range(len(dataset))] == expected
    per_token = sum(len(text.encode()) for text in (TEXTS[0], TEXTS[2], TEXTS[0])) / dataset.num_tokens
    first, last = output.splitlines()
    assert first == (
        f"{tmp_path}/new/a_text_document.bin/.idx: 3 documents, {dataset.num_tokens} tokens, "
        f"{per_token:.2f} bytes/token, 1 empty documents dropped"
    )
    assert last.endswith(" tokens/s")


def test_options(folder: Path, tmp_path: Path) -> None:
    common = ("--tokenizer", folder / "tokenizer", "--output", tmp_path / "a")
    run_well("preprocess_data", *common, "--input", folder / "good.jsonl.gz", "--json-keys", "text", "title", "--no-append-eod")
    assert len(IndexedDataset(tmp_path / "a_text_document")) == 2
    titles = IndexedDataset(tmp_path / "a_title_document")
    run_well("preprocess_data", *common, "--input", folder / "good.jsonl.gz", "--metadata", r"# {title}\n", "--no-append-eod")
    rows, reference = IndexedDataset(tmp_path / "a_text_metadata"), AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert [rows.tokens(number).tolist() for number in range(len(rows))] == [reference(f"# title {n}\n")["input_ids"] for n in (0, 2)]
    assert len(titles) == 3 and titles.tokens(0)[-1] != 2
    output = run_well("preprocess_data", *common, "--input", folder / "bad.jsonl", "--on-error", "skip", "--text-key", "title")
    assert f"2 unreadable records skipped, listed in {tmp_path}/a.skipped.jsonl" in output
    assert [json.loads(line)["place"] for line in (tmp_path / "a.skipped.jsonl").read_text().splitlines()] == ["line 4", "line 5"]


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    common = ("--tokenizer", folder / "tokenizer", "--output", tmp_path / "out" / "a")
    for path, message in (
        (folder / "bad.jsonl", f"error: {folder}/bad.jsonl, line 4: bad JSON: Expecting value at column 1\n"),
        (folder / "nothing", f"error: {folder}/nothing: no such file or folder, accepted: .jsonl"),
    ):
        done = run("preprocess_data", "--input", path, *common)
        assert done.status == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
    done = run("train_tokenizer", "--input", folder / "bad.jsonl", "--vocab-size", 290, "--output", tmp_path / "t")
    assert done.status == 1 and done.stderr.endswith("bad.jsonl, line 4: bad JSON: Expecting value at column 1\n")
    done = run("train_tokenizer", "--input", folder / "bad.jsonl", "--vocab-size", 290, "--output", tmp_path / "t", "--on-error", "skip")
    assert done.status == 0 and done.stderr.count("skipped: ") == 2


def test_bar_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["--input", folder / "good.jsonl.gz", "--tokenizer", folder / "tokenizer", "--output", tmp_path / "a"]
    subprocess.run([sys.executable, TOOLS / "preprocess_data.py", *arguments], stdout=theirs, check=True, timeout=120)
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    assert b"documents/s" in shown and b"100%" in shown and b"ETA" in shown


def read_terminal(descriptor: int) -> bytes:
    """Some output, or nothing at the end, which Linux reports as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def test_merge(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        run_well(
            "preprocess_data",
            *("--input", folder / "good.jsonl.gz", "--tokenizer", folder / "tokenizer"),
            *("--output", tmp_path / name),
        )
    sets = [tmp_path / f"{name}_text_document" for name in "ab"]
    output = run_well("merge_datasets", "--input", *sets, "--output", tmp_path / "new" / "ab")
    merged, single = IndexedDataset(tmp_path / "new" / "ab"), IndexedDataset(sets[0])
    assert merged.lengths.tolist() == single.lengths.tolist() * 2
    assert output == f"{tmp_path}/new/ab.bin/.idx: 4 documents, {2 * single.num_tokens} tokens\n"
    done = run("merge_datasets", "--input", tmp_path / "c", "--output", tmp_path / "d")
    assert done.status == 1 and done.stderr.startswith(f"error: {tmp_path}/c.idx: No such file")


def test_benchmark_verifies_tokens_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[0] * 50}) + "\n" for _ in range(20)))
    before = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_preprocessing.py", "--input", path, "--tokenizer", folder / "tokenizer", "--repeats", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "20 documents, 2 workers" in done.stdout and "ratio" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
