"""Text to token ids and back, with any tokenizer folder that ``transformers`` loads."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from megatron_ext.atomic_io import atomic_open
from megatron_ext.data.words import FindWords, word_finder
from megatron_ext.errors import DataError

LARGEST_UINT16_VOCABULARY = 65499  # Megatron's rule for the dtype of a .bin
LARGEST_ID = (1 << 24) - 1
"""Of a token. Tokenizers counts all ids below the largest when it writes, with 4 bytes for each that is missing, and ends the process when
memory does."""

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt"),
)


class Tokenizer:
    """Token ids of plain text, without special tokens added.

    Equal to ``AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)``, and faster where a text falls into independent
    words (see ``word_finder``): a word that was seen before is looked up. Can be pickled to another process.

    Args:
        definition: contents of a ``tokenizer.json``.
        eod_id: token that ends a document.
        name: what to call the tokenizer in messages.
        split_special_tokens: read special tokens in texts as any other words.
        bos_id: token that begins a document where there is one; no text gets it by itself.
    """

    def __init__(self, definition: str, eod_id: int, name: str, split_special_tokens: bool = False, bos_id: int | None = None) -> None:
        self.name, self.eod_id, self.bos_id = name, eod_id, bos_id
        self._definition, self._split_special_tokens = definition, split_special_tokens
        self._backend = Backend.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = split_special_tokens
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = token_dtype(self.vocab_size)
        find_words = word_finder(json.loads(definition), split_special_tokens)
        self._words = WordCache(self._backend, self.dtype, find_words) if find_words else None

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Any, ...]]:
        return Tokenizer, (self._definition, self.eod_id, self.name, self._split_special_tokens, self.bos_id)

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, ``self.dtype`` [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, ``self.dtype`` [tokens]."""
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=skip_special_tokens)


class WordCache:
    """Ids of words that were seen before.

    Args:
        backend: tokenizer to ask for a new word.
        dtype: of the ids.
        find_words: cuts a text where the tokenizer's tokens end.
        max_words: words to remember; text of any size needs no more memory than that.
        max_length: characters of the longest word to remember.
    """

    def __init__(self, backend: Backend, dtype: np.dtype, find_words: FindWords, max_words: int = 1 << 18, max_length: int = 64) -> None:
        self._backend, self._dtype, self._find_words = backend, dtype, find_words
        self._max_words, self._max_length = max_words, max_length
        self._ids: dict[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, [tokens]."""
        words = self._find_words(text)
        unknown = set(words).difference(self._ids)
        if unknown:
            self._add(list(unknown))
        ids = np.frombuffer(b"".join([self._ids[word] for word in words]), dtype=self._dtype)
        if unknown:
            self._forget(unknown)
        return ids

    def _add(self, words: list[str]) -> None:
        encodings = self._backend.encode_batch_fast(words, add_special_tokens=False)
        self._ids.update((word, np.array(found.ids, dtype=self._dtype).tobytes()) for word, found in zip(words, encodings, strict=True))

    def _forget(self, new: set[str]) -> None:
        """Keep the cache small: long words hardly ever come again, and a full cache starts anew."""
        for word in new:
            if len(word) > self._max_length:
                del self._ids[word]
        if len(self._ids) > self._max_words:
            self._ids.clear()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load any tokenizer folder that ``transformers.AutoTokenizer`` loads and that has a Rust backend. No network, no remote code.

    Raises:
        DataError: the folder holds no usable tokenizer, or the tokenizer has no end-of-sequence token.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise DataError(f"{folder}: not a tokenizer folder, expected one with {', '.join(FILES[:2])} or tokenizer.model")
    with _damage_told(f"{folder}: transformers cannot load this tokenizer"):
        loaded = _loader(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not loaded.is_fast:
        raise DataError(f"{folder}: {type(loaded).__name__} has no tokenizer.json backend, expected a fast tokenizer")
    if loaded.eos_token_id is None:
        raise DataError(f"{folder}: the tokenizer has no eos_token, which is needed to end documents")
    token, largest = max(loaded.get_vocab().items(), key=itemgetter(1))
    if largest > LARGEST_ID:
        raise DataError(f"{folder}: the id of token {token!r} is {largest}; accepted: ids to {LARGEST_ID}")
    with _damage_told(f"{folder}: this tokenizer contradicts itself"):
        definition = loaded.backend_tokenizer.to_str()
        return Tokenizer(definition, loaded.eos_token_id, str(folder), loaded.split_special_tokens, loaded.bos_token_id)


@contextmanager
def _damage_told(what: str) -> Iterator[None]:
    """DataError for all that tokenizers raises for a damaged file: bare Exceptions, and panics, which are none and have no public name."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {error}") from error


def _loader(folder: Path) -> Any:
    """The class to load a folder with, which is AutoTokenizer except where that would not do what the folder says.

    Beside a config.json of some model types (qwen2 in transformers 5), AutoTokenizer puts the model's own pre-tokenizer in the place of the
    one in a tokenizer.json that is declared to be complete.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # a second of imports that preprocessing workers do without

    config, definition = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (config.is_file() and definition.is_file()):
        return AutoTokenizer
    declared = json.loads(config.read_text("utf-8")).get("tokenizer_class")
    return PreTrainedTokenizerFast if declared in ("PreTrainedTokenizerFast", "TokenizersBackend") else AutoTokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """Type of the ids of a vocabulary in a .bin: uint16 where Megatron takes it, else int32."""
    return np.dtype(np.uint16 if vocab_size <= LARGEST_UINT16_VOCABULARY else np.int32)


def copy_tokenizer_files(source: str | Path, target: str | Path) -> None:
    """Copy a tokenizer's files from one existing folder to another, each atomically.

    Raises:
        DataError: there is none in ``source``.
    """
    names = [name for name in FILES if (Path(source) / name).is_file()]
    if not names:
        raise DataError(f"{source}: no tokenizer files, expected for example {', '.join(FILES[:2])}")
    for name in names:
        with open(Path(source) / name, "rb") as original, atomic_open(Path(target) / name, "wb") as copy:
            shutil.copyfileobj(original, copy)
