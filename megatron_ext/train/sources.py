"""From the data section of a configuration, and those of the runs that it replays, to corpora and shares."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import RunConfig, load_config
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions
from megatron_ext.errors import ConfigError

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Share:
    """A source, its share of all training tokens, and the share of its documents that is held out."""

    source: SourceOptions
    share: float
    held_out: float


def training_shares(data: DataOptions, replayed_by: tuple[str, ...] = ()) -> list[Share]:
    """Sources of a run with their shares of the tokens, those that it replays included.

    Args:
        data: the data section.
        replayed_by: run directories on the way here, to notice a circle.

    Raises:
        ConfigError: a run directory to replay has no configuration, replays itself, or brings a name that is already there.
    """
    new_share = 1.0 - (data.replay.share if data.replay else 0.0)
    shares = _weighted(data.sources, new_share, data.validation_fraction)
    if data.replay is None:
        return shares
    if data.replay.run is None:
        shares += _weighted(data.replay.sources, data.replay.share, data.validation_fraction)
    else:
        shares += _replayed(data.replay.run, data.replay.share, data.validation_fraction, replayed_by)
    names = [share.source.name for share in shares]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"data.replay: source {twice[0]!r} is replayed and also new; accepted: names that differ from those of data.sources"
        )
    return shares


def _weighted(sources: list[SourceOptions], total: float, held_out: float) -> list[Share]:
    weights = sum(source.weight for source in sources)
    return [Share(source, total * source.weight / weights, held_out) for source in sources]


def _replayed(run: str, share: float, held_out: float, replayed_by: tuple[str, ...]) -> list[Share]:
    """The mixture of an earlier run. What that run held out stays held out."""
    path = Path(run) / CONFIG_FILE
    if str(path.resolve()) in replayed_by:
        raise ConfigError(f"data.replay.run: {run} replays itself")
    if not path.is_file():
        raise ConfigError(f"data.replay.run is {run!r}, where there is no {CONFIG_FILE}; accepted: the directory of an earlier run")
    earlier = training_shares(load_config(path, []).data, (*replayed_by, str(path.resolve())))
    return [Share(each.source, share * each.share, max(held_out, each.held_out)) for each in earlier]


def build_mixture(config: RunConfig) -> Mixture:
    """The training mixture of a run. Raises ConfigError or DataError for sources that cannot be used."""
    shares = training_shares(config.data)
    corpora = [Corpus(each.source, each.held_out) for each in shares]
    return Mixture(corpora, [each.share for each in shares], config.seed, config.data.sequence_length)
