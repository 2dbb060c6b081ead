"""From the data section of a configuration, and those of the runs that it replays, to corpora and shares."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config import RunConfig, load_config, total_steps
from megatron_ext.data.corpus import Corpus
from megatron_ext.data.decomposed_mixture import DecomposedMixture
from megatron_ext.data.mixture import Mixture
from megatron_ext.data.options import DataOptions, SourceOptions, StageOptions
from megatron_ext.data.sampler import Sampler
from megatron_ext.data.shares import ConstantShares, Fade, FadingShares, Shares
from megatron_ext.data.stages import Stage
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.parallel.world import World

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Share:
    """A source, its share of all training tokens, and the share of its documents that is held out."""

    source: SourceOptions
    share: float
    held_out: float


def training_shares(data: DataOptions, stage: StageOptions | None = None, replayed_by: tuple[str, ...] = ()) -> list[Share]:
    """Sources of a run with their shares of the tokens: those that it names, then those that it replays.

    Args:
        data: the data section.
        stage: whose weights and share of replay count instead of those of ``data``; null: none.
        replayed_by: run directories on the way here, to notice a circle.

    Raises:
        ConfigError: a run directory to replay has no configuration, replays itself, or brings a name that is already there.
    """
    stage = stage or StageOptions()
    replay_share = data.replay.share if data.replay else 0.0
    replay_share = replay_share if stage.replay_share is None else stage.replay_share
    shares = _weighted(data.sources, 1.0 - replay_share, data.validation_fraction, stage.weights or {})
    if data.replay is None:
        return shares
    if data.replay.run is None:
        shares += _weighted(data.replay.sources, replay_share, data.validation_fraction, {})
    else:
        shares += _replayed(data.replay.run, replay_share, data.validation_fraction, replayed_by)
    names = [share.source.name for share in shares]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"data.replay: source {twice[0]!r} is replayed and also new; accepted: names that differ from those of data.sources"
        )
    return shares


def _weighted(sources: list[SourceOptions], total: float, held_out: float, changed: dict[str, float]) -> list[Share]:
    weights = [changed.get(source.name, source.weight) for source in sources]
    return [Share(source, total * weight / sum(weights), held_out) for source, weight in zip(sources, weights, strict=True)]


def _replayed(run: str, share: float, held_out: float, replayed_by: tuple[str, ...]) -> list[Share]:
    """The mixture of an earlier run. What that run held out stays held out."""
    path = Path(run) / CONFIG_FILE
    if str(path.resolve()) in replayed_by:
        raise ConfigError(f"data.replay.run: {run} replays itself")
    if not path.is_file():
        raise ConfigError(f"data.replay.run is {run!r}, where there is no {CONFIG_FILE}; accepted: the directory of an earlier run")
    earlier = training_shares(load_config(path, []).data, replayed_by=(*replayed_by, str(path.resolve())))
    return [Share(each.source, share * each.share, max(held_out, each.held_out)) for each in earlier]


def build_mixture(config: RunConfig) -> Sampler:
    """The training mixture of a run. Raises ConfigError or DataError for sources that cannot be used."""
    data = config.data
    shares = training_shares(data)
    corpora = [Corpus(each.source, each.held_out) for each in shares]
    if (parts := data.decomposition) is not None:
        weights = [each.share for each in shares]
        length = data.sequence_length
        return DecomposedMixture(corpora, weights, config.seed, length, parts.smallest, parts.curriculum, parts.cycle_tokens)
    first, *later = build_stages(data, total_steps(config))
    return Mixture(corpora, first.shares, config.seed, first.sequence_length, first.metadata, later)


def check_same_data(mixture: Sampler, world: World) -> None:
    """Raise DataError on all ranks if one sees other training data than rank 0."""
    seen = world.gather(mixture.fingerprint())
    other = next((rank for rank, each in enumerate(seen) if each != seen[0]), None)
    if other is not None:
        raise DataError(f"rank {other} sees other training data than rank 0: the files of data.sources differ between machines")


def build_stages(data: DataOptions, steps: int) -> list[Stage]:
    """The stages of a run of so many steps; one if the options name none. Raises as ``training_shares``."""
    return [
        Stage(begin, options.sequence_length or data.sequence_length, _shares(data, options), options.metadata, begin_step)
        for options, (begin, begin_step) in zip(data.stages or [StageOptions()], data.stage_begins(steps), strict=True)
    ]


def _shares(data: DataOptions, stage: StageOptions) -> Shares:
    """Shares of the sources in a stage, in the order of ``training_shares``."""
    decay = data.replay.decay if data.replay else None
    if decay is None or stage.replay_share is not None:
        return ConstantShares.of([each.share for each in training_shares(data, stage)])
    assert data.replay is not None, "it has a decay"
    new, replayed = (tuple(each.share for each in training_shares(data, replace(stage, replay_share=share))) for share in (0.0, 1.0))
    return FadingShares(new, replayed, Fade(data.replay.share, decay.to, decay.tokens, decay.shape))
