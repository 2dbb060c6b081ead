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
    if config.distillation is not None:
        yield "distillation.teacher", Path(config.distillation.teacher)
    if config.data.replay is not None and config.data.replay.run is not None:
        yield "data.replay.run", Path(config.data.replay.run)
    replayed = config.data.replay.sources if config.data.replay else []
    for section, sources in (("sources", config.data.sources), ("replay.sources", replayed), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            key = f"data.{section}.{index}"
            for name, prefix in (("path", source.path), ("metadata", source.metadata)):
                if prefix is not None:
                    yield from ((f"{key}.{name}", Path(prefix + ending)) for ending in (".idx", ".bin"))
            for name in ("scores", "document_weights", "token_weights"):
                if (path := getattr(source, name)) is not None:
                    yield f"{key}.{name}", Path(path)
