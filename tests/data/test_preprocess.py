"""Documents to tokens: what is written, for any number of workers, and what a killed run leaves behind."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from megatron_ext.data import progress, readers
from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.preprocess import KeySummary, Summary, preprocess
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.data.tokenizer_training import train_tokenizer
from megatron_ext.errors import DataError

WORDS = ["some", "words", "of", "a", "small", "corpus,", "12", "é\n", "", "", "and", "code:", "f(x)", "=", "y\n"]

LOAD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from megatron_ext.data.preprocess import preprocess\n"
    "from megatron_ext.data.tokenizer import Tokenizer\n"
    "tokenizer = Tokenizer(Path(sys.argv[2], 'tokenizer.json').read_text(), 2, 'trained', True)\n"
)
"""Beginning of a program that has a tokenizer at once, without the time and memory that transformers takes."""


def some_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 200))) for _ in range(count)]


def write_json_lines(path: Path, texts: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "title": f"title {number}"}) + "\n" for number, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(some_texts(50), 300, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokens_are_those_of_transformers_and_end_with_eod(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    texts = some_texts(40)
    summary = preprocess([write_json_lines(tmp_path / "in.jsonl", texts)], tokenizer, tmp_path / "out" / "set")
    dataset = IndexedDataset(tmp_path / "out" / "set_text_document")
    reference = AutoTokenizer.from_pretrained(folder)
    for number, text in enumerate(texts):
        assert dataset.tokens(number).tolist() == [*reference(text, add_special_tokens=False)["input_ids"], reference.eos_token_id]
    key = summary.keys["text"]
    assert (key.documents, key.tokens, key.empty, summary.skipped) == (40, dataset.num_tokens, 0, 0)
    assert key.num_bytes == sum(len(text.encode()) for text in texts)
    assert summary.done_bytes == summary.total_bytes == (tmp_path / "in.jsonl").stat().st_size
    assert dataset.dtype == np.uint16


def test_without_eod(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["some words"])
    preprocess([path], tokenizer, tmp_path / "set", append_eod=False)
    assert IndexedDataset(tmp_path / "set_text_document").tokens(0).tolist() == tokenizer.encode("some words").tolist()


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(readers, "READ_BYTES", 500)
    texts: list[object] = [*some_texts(60), "", 5, "  \n"]
    inputs = [write_json_lines(tmp_path / f"in{part}.jsonl", texts[part::3]) for part in range(3)]
    written = []
    for workers in (1, 2, 3):
        output = tmp_path / f"out{workers}"
        summary = preprocess(inputs, tokenizer, output / "set", workers=workers, on_error="skip", keys=("text", "title"))
        assert (summary.keys["text"].documents, summary.keys["text"].empty, summary.skipped) == (60, 2, 1)
        assert summary.keys["title"].documents == 62
        written.append(files(output))
    assert written[0] == written[1] == written[2]
    assert set(written[0]) == {
        *("set_text_document.bin", "set_text_document.idx", "set_title_document.bin", "set_title_document.idx"),
        "set.skipped.jsonl",
    }


def test_skipped_records_are_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["a", None, "b"])
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    summary = preprocess([path], tokenizer, tmp_path / "set", on_error="skip")
    assert summary.skipped == 2 and summary.documents == 2
    listed = [json.loads(line) for line in (tmp_path / "set.skipped.jsonl").read_text().splitlines()]
    assert [(entry["path"], entry["place"]) for entry in listed] == [(str(path), "line 2"), (str(path), "line 4")]
    assert listed[0]["reason"] == "'text' is null, expected a string"


@pytest.mark.parametrize("workers", [1, 2])
def test_first_bad_record_fails_and_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["a", 1, 2])
    with pytest.raises(DataError, match=r"in\.jsonl, line 2: 'text' is 1, expected a string"):
        preprocess([path], tokenizer, tmp_path / "out" / "set", workers=workers)
    assert not files(tmp_path / "out")


def test_no_document_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["", " "])
    with pytest.raises(DataError, match=r"in\.jsonl: no document with text in 1 files \(0 unreadable\)"):
        preprocess([path], tokenizer, tmp_path / "out" / "set")
    assert not files(tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"on_error": "ignore"}, {"keys": ()}, {"keys": ("a", "a")}])
def test_wrong_arguments(tmp_path: Path, tokenizer: Tokenizer, wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"expected workers >= 1, on_error one of fail, skip, and different keys"):
        preprocess([write_json_lines(tmp_path / "in.jsonl", ["a"])], tokenizer, tmp_path / "set", **wrong)


def test_killed_run_leaves_no_set_and_the_next_one_starts_clean(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """A real SIGKILL, in the middle of writing, over an older complete set of the same name."""
    path = write_json_lines(tmp_path / "in.jsonl", some_texts(300))
    expected = preprocess([path], tokenizer, tmp_path / "expected" / "set").keys["text"].prefix
    preprocess([write_json_lines(tmp_path / "old.jsonl", ["old"])], tokenizer, tmp_path / "out" / "set")
    old = files(tmp_path / "out")
    program = (
        f"{LOAD}import time\n"
        "from megatron_ext.data import readers\n"
        "readers.BLOCK_BYTES = readers.READ_BYTES = 2000\n"
        "def slowly(summary):\n"
        "    print(summary.documents, flush=True)\n"
        "    time.sleep(0.02)\n"
        "preprocess([sys.argv[1]], tokenizer, sys.argv[3], workers=2, progress=slowly)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, path, folder, tmp_path / "out" / "set"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while int(run.stdout.readline()) < 30:
        pass
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    left = files(tmp_path / "out")
    assert {name: left[name] for name in old} == old, "the old set is whole"
    assert set(left) - set(old) == {"set_text_document.bin.partial", "set_text_document.idx.partial"}
    preprocess([path], tokenizer, tmp_path / "out" / "set")
    assert set(files(tmp_path / "out")) == set(old)
    for ending in (".bin", ".idx"):
        assert Path(f"{tmp_path}/out/set_text_document{ending}").read_bytes() == Path(expected + ending).read_bytes()


def test_memory_does_not_grow_with_the_input(tmp_path: Path, folder: Path) -> None:
    """Peak memory of a run over 8 times the input, in a process of its own."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_bytes(write_json_lines(tmp_path / "some.jsonl", some_texts(300)).read_bytes() * 20)
    large.write_bytes(small.read_bytes() * 8)
    program = (
        f"{LOAD}import resource\n"
        "preprocess([sys.argv[1]], tokenizer, sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    kilobytes = [
        int(subprocess.run([sys.executable, "-c", program, path, folder, tmp_path / "set"], capture_output=True, check=True).stdout)
        for path in (small, large)
    ]
    assert large.stat().st_size > 20e6
    assert kilobytes[1] - kilobytes[0] < 6_000


def summary_at(share: float) -> Summary:
    return Summary(1000, {"text": KeySummary("p", documents=12_345, tokens=6_000_000)}, int(1000 * share), started=time.monotonic() - 10)


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    output = io.StringIO()
    with progress.show_progress(Console(file=output, width=200)) as show:
        show(summary_at(0.25))
    assert re.fullmatch(r" 25\.0%  12,345 documents  1,2\d\d documents/s  (5\d\d|600),\d+ tokens/s  ETA 3\d s\n", output.getvalue())


def test_progress_is_a_bar_on_a_terminal() -> None:
    output = io.StringIO()
    with progress.show_progress(Console(file=output, width=200, force_terminal=True)) as show:
        show(summary_at(0.25))
    assert all(part in output.getvalue() for part in ("12,345 documents", "documents/s", "tokens/s", "25%", "ETA"))


def test_lines_are_seldom() -> None:
    output = io.StringIO()
    with progress.show_progress(Console(file=output)) as show:
        for _ in range(100):
            show(summary_at(0.5))
    assert output.getvalue() == ""
