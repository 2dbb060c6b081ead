"""Validation tokens from pairs and from text: the same documents, whatever they come from."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ext.data.batch import PackedBatch
from megatron_ext.data.indexed import IndexedDataset
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.train.evaluation_packs import evaluation_packs
from tests.data.byte_level import byte_level_backend

TEXTS = [f"document {number} says " + "the same again, " * number for number in range(1, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and documents as JSON lines and as a pair."""
    folder = tmp_path_factory.mktemp("evaluation")
    backend = byte_level_backend(pre_tokenizers.ByteLevel(add_prefix_space=False), TEXTS)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess([folder / "texts.jsonl"], load_tokenizer(folder / "tokenizer"), folder / "pair")
    return folder


def pieces(packs: list[PackedBatch]) -> list[tuple[int, ...]]:
    """The tokens of every piece."""
    found = []
    for pack in packs:
        bounds = pack.cu_seqlens.tolist()
        found += [tuple(pack.tokens[a:b].tolist()) for a, b in pairwise(bounds)]
    return sorted(found)


def test_all_tokens_of_a_pair_are_there_once(folder: Path) -> None:
    prefix = folder / "pair_text_document"
    packs = evaluation_packs(str(prefix), folder / "nothing", 32, 10**6, 600)
    dataset = IndexedDataset(prefix)
    expected = [dataset.tokens(document) for document in range(len(dataset))]
    cut = sorted(tuple(tokens[start : start + 32].tolist()) for tokens in expected for start in range(0, len(tokens), 32))
    assert pieces(packs) == [piece for piece in cut if len(piece) > 1], "a piece of one token is the last of a document and has no label"
    assert sum(int(pack.loss_weight.sum()) for pack in packs) == sum(len(tokens) - 1 for tokens in expected)
    assert all(len(pack.tokens) <= 32 for pack in packs)
    assert len(packs) < len(pieces(packs)), "short pieces share packs"
    assert max(int(pack.positions.max()) for pack in packs) == 31


def test_text_gives_the_same_tokens_as_its_pair(folder: Path, tmp_path: Path) -> None:
    from_pair = evaluation_packs(str(folder / "pair_text_document"), folder / "tokenizer", 64, 10**6, 600)
    from_text = evaluation_packs(str(folder / "texts.jsonl"), folder / "tokenizer", 64, 10**6, 600)
    assert pieces(from_text) == pieces(from_pair)
    (tmp_path / "one.txt").write_text(TEXTS[3])
    tokenizer = load_tokenizer(folder / "tokenizer")
    [pack] = evaluation_packs(str(tmp_path / "one.txt"), folder / "tokenizer", 2000, 10**6, 600)
    assert pack.tokens.tolist() == [*tokenizer.encode(TEXTS[3]).tolist(), tokenizer.eod_id]


def test_number_of_tokens_is_kept_to(folder: Path) -> None:
    few, again = (evaluation_packs(str(folder / "pair_text_document"), folder, 32, 200, 600) for _ in range(2))
    assert 200 <= sum(len(pack.tokens) for pack in few) < 200 + 32
    assert pieces(few) == pieces(again)


def test_wrong_input(folder: Path) -> None:
    with pytest.raises(DataError, match="prefix of a .bin/.idx pair, and a file or folder of text; there is neither"):
        evaluation_packs(str(folder / "missing"), folder / "tokenizer", 32, 100, 600)
    with pytest.raises(DataError, match="not a tokenizer folder"):
        evaluation_packs(str(folder / "texts.jsonl"), folder, 32, 100, 600)
    with pytest.raises(DataError, match="is outside the model's vocabulary of 5; the corpus was made with another tokenizer"):
        evaluation_packs(str(folder / "pair_text_document"), folder, 32, 100, 5)
    (folder / "cut.idx").write_bytes(b"MMID")
    (folder / "cut.bin").write_bytes(np.zeros(4, np.uint16).tobytes())
    with pytest.raises(DataError, match="truncated"):
        evaluation_packs(str(folder / "cut"), folder, 32, 100, 600)
