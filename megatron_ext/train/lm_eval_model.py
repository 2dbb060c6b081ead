"""A checkpoint as a model of EleutherAI's lm-eval, whose prompts are packed and not padded. Written against lm-eval 0.4.13.

Importing this needs the extra ``eval``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.model.gpt import GPT
from megatron_ext.train.prompt_evaluation import continuation_scores, continue_greedily, rolling_windows

_NEW_TOKENS = 256
"""New tokens of a task that does not say how many: what lm-eval assumes of other models."""
_NEW_TOKEN_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class PackedModel(LM):
    """Answers the three kinds of requests of lm-eval with a whole model in this process.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        tokens_per_pack: most tokens of a forward pass.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, tokens_per_pack: int) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._most, self._tokens_per_pack = model.config.max_position, tokens_per_pack
        self._first = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
        """What stands before a text without a context, as in lm-eval's own model."""

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells caches of requests apart by."""
        return self._tokenizer.name

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of each (context, continuation), in nats, and whether the continuation is greedy.

        Of a request that is longer than the model takes the end counts. Raises DataError for a continuation that is itself too long.
        """
        pairs = [self._kept(*self._encoded(*request.args)) for request in requests]
        scores = continuation_scores(self._model, pairs, self._tokens_per_pack)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Of each whole text, in nats, behind the token that begins a document and in windows of what the model takes."""
        texts = [rolling_windows(self._encode(request.args[0]), self._first, self._most) for request in requests]
        scores = iter(continuation_scores(self._model, [window for windows in texts for window in windows], self._tokens_per_pack))
        return [sum(next(scores).log_likelihood for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The greedy continuation of each context, up to a stop word, the end of the document or the number of new tokens.

        Raises:
            ConfigError: a task wants samples or beams.
        """
        options = [request.args[1] for request in requests]
        for each in options:
            _check_greedy(each)
        most = [next((int(each[key]) for key in _NEW_TOKEN_KEYS if key in each), _NEW_TOKENS) for each in options]
        stops = [_stop_words(each) for each in options]
        prompts = [self._prompt(request.args[0], new) for request, new in zip(requests, most, strict=True)]

        def is_complete(number: int, new: list[int]) -> bool:
            if new[-1] == self._tokenizer.eod_id:
                return True
            text = self._tokenizer.decode(new)
            return any(stop in text for stop in stops[number])

        continued = continue_greedily(self._model, prompts, most, is_complete, self._tokens_per_pack)
        return [_cut(self._tokenizer.decode(new), words) for new, words in zip(continued, stops, strict=True)]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as tokens. The two are encoded together, with spaces at the end of the context as part of the continuation."""
        begin = context.rstrip()
        first = self._encode(begin)
        rest = self._encode(context + continuation)[len(first) :]
        return first or [self._first], rest

    def _kept(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of a request that the model can take: it reads all but the last token."""
        room = self._most + 1 - len(continuation)
        if room < 1:
            raise DataError(f"a continuation has {len(continuation)} tokens; the model takes {self._most}")
        return context[-room:], continuation

    def _prompt(self, context: str, new_tokens: int) -> list[int]:
        room = self._most - new_tokens
        if room < 1:
            raise ConfigError(f"{new_tokens} new tokens are wanted; accepted: fewer than the {self._most} tokens that the model takes")
        return self._encode(context)[-room:] or [self._first]


def _check_greedy(options: Mapping[str, Any]) -> None:
    samples = options.get("do_sample", False) and options.get("temperature", 1.0) > 0
    if samples or options.get("num_beams", 1) != 1:
        raise ConfigError(f"generation_kwargs of the task are {dict(options)}; accepted: greedy decoding (do_sample false, no beams)")


def _stop_words(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [word for word in until if word]


def _cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop words."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
