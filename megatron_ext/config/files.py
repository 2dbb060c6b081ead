"""The files that a run reads before it starts."""

from collections.abc import Iterator
from pathlib import Path

from megatron_ext.config.schema import RunConfig


def files_of(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Tokenizer, model and corpora of a run: the key that names each, and its path. What ``data.replay.run`` reads is not among them."""
    if config.tokenizer is not None:
        yield "tokenizer", Path(config.tokenizer)
    if config.model.init_from is not None:
        yield "model.init_from", Path(config.model.init_from)
    if config.data.replay is not None and config.data.replay.run is not None:
        yield "data.replay.run", Path(config.data.replay.run)
    replayed = config.data.replay.sources if config.data.replay else []
    for section, sources in (("sources", config.data.sources), ("replay.sources", replayed), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            for ending in (".idx", ".bin"):
                yield f"data.{section}.{index}.path", Path(source.path + ending)
            if source.scores is not None:
                yield f"data.{section}.{index}.scores", Path(source.scores)
