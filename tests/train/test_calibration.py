"""Known coefficients come back from their own timings, and real ranks give a cost model that a run can read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.atomic_io import write_json
from megatron_ext.config import load_config
from megatron_ext.parallel.world import World
from megatron_ext.planning import CostModel
from megatron_ext.planning.cost_file import cost_to_json, load_cost_model
from megatron_ext.planning.cost_model import Array, AttentionShape, Curve
from megatron_ext.train import calibration
from megatron_ext.train.build import build_grid, prepare
from megatron_ext.train.calibration import Calibration, byte_sizes, calibrate, designed_trials, halves, random_lengths
from megatron_ext.train.calibration_fit import attention_efficiency, curve_of, fit_compute, nonnegative_least_squares, without_dips
from megatron_ext.train.calibration_probes import Clock, Probe, TimedPacks, measure
from tests.distributed import RunRanks
from tests.grids import ALONE
from tests.train.tiny_run import write_run

BASE = CostModel(4096, efficiency_tokens=(16.0, 256.0, 4096.0), efficiency=(0.1, 0.5, 1.0))
PACKS = [trial.lengths for trial in designed_trials(4096)]


def seconds_of(cost: CostModel, packs: Sequence[Sequence[int]] = PACKS) -> list[float]:
    return [cost.per_pack + float(cost.work(np.array(lengths)).sum()) for lengths in packs]


@pytest.mark.parametrize("per_token", [3e-6, 0.0])
@pytest.mark.parametrize("per_token_squared", [2e-10, 0.0])
@pytest.mark.parametrize("per_pack", [4e-3, 1e-5])
def test_the_fit_finds_the_coefficients_that_made_the_seconds(per_token: float, per_token_squared: float, per_pack: float) -> None:
    truth = replace(BASE, per_token=per_token, per_token_squared=per_token_squared, per_pack=per_pack)
    found, fit = fit_compute(BASE, PACKS, seconds_of(truth))
    assert (found.per_token, found.per_pack) == pytest.approx((per_token, per_pack), rel=1e-9, abs=1e-15)
    assert found.per_token_squared == pytest.approx(per_token_squared, rel=1e-9, abs=1e-19)
    assert fit.worst < 1e-9 and fit.r_squared == pytest.approx(1.0)
    assert replace(found, per_token=0.0, per_token_squared=0.0, per_pack=0.0) == replace(BASE, per_token=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_coefficients_by_little(seed: int) -> None:
    """With 2 % of noise on every pack, each coefficient within 10 %, and what it predicts of packs within 3 %."""
    truth = replace(BASE, per_token=3e-6, per_token_squared=2e-9, per_pack=2e-3)
    noise = 1.0 + 0.02 * np.random.default_rng(seed).standard_normal(len(PACKS))
    found, fit = fit_compute(BASE, PACKS, np.array(seconds_of(truth)) * noise)
    for name in ("per_token", "per_token_squared", "per_pack"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.1)
    assert seconds_of(found) == pytest.approx(seconds_of(truth), rel=0.03)
    assert fit.worst < 0.08 and 0.99 < fit.r_squared < 1.0


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_is_where_no_direction_leads_down(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker, which hold at the solution alone."""
    draw = np.random.default_rng(seed)
    matrix, target = draw.standard_normal((8, 3)) * 10.0 ** draw.integers(-6, 6, 3), draw.standard_normal(8)
    solution = nonnegative_least_squares(matrix, target)
    scale = np.linalg.norm(matrix, axis=0)
    slope = matrix.T @ (matrix @ solution - target) / scale
    assert (solution >= 0).all()
    assert (slope >= -1e-9).all() and (np.abs(slope * solution * scale) < 1e-9).all()


def test_nonnegative_least_squares_of_what_has_no_positive_part() -> None:
    assert nonnegative_least_squares(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([-1.0, -2.0])).tolist() == [0.0, 0.0]


def test_efficiency_is_the_share_of_the_best_rate() -> None:
    lengths, rates = [16, 64, 256], [0.2, 0.5, 1.0]
    tokens, efficiency = attention_efficiency(lengths, [3e-9 * s * s / rate for s, rate in zip(lengths, rates, strict=True)])
    assert tokens == (16.0, 64.0, 256.0) and efficiency == pytest.approx(rates)


@pytest.mark.parametrize("seed", range(10))
def test_efficiency_is_a_share_whatever_the_noise_and_longer_documents_take_longer(seed: int) -> None:
    lengths = halves(4096, 16)[::-1]
    noisy = np.array(lengths) ** 2 * 10.0 ** np.random.default_rng(seed).uniform(-2, 2, len(lengths))
    tokens, efficiency = attention_efficiency(lengths, noisy)
    assert max(efficiency) == 1.0 and min(efficiency) > 0
    work = replace(BASE, per_token=0.0, per_token_squared=1.0, efficiency_tokens=tokens, efficiency=efficiency).work(np.array(lengths))
    assert (np.diff(work) >= -1e-9 * work[1:]).all()


def test_dips_are_noise_of_both_sides() -> None:
    assert without_dips([1.0, 2.0, 3.0]) == pytest.approx([1.0, 2.0, 3.0])
    assert without_dips([1.0, 8.0, 2.0, 16.0]) == pytest.approx([1.0, 4.0, 4.0, 16.0])
    assert without_dips([4.0, 2.0, 1.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert curve_of([8], [0.5]) == Curve((8.0,), (0.5,))


@pytest.mark.parametrize("tokens", [1, 2, 7, 32, 100, 4096, 131072])
def test_packs_of_the_fit_fit_and_tell_coefficients_apart(tokens: int) -> None:
    packs = [trial.lengths for trial in designed_trials(tokens)]
    assert all(0 < sum(lengths) <= tokens and min(lengths) > 0 for lengths in packs) and (tokens,) in packs
    parts = np.array([[sum(lengths), sum(length**2 for length in lengths), 1.0] for lengths in packs])
    assert np.linalg.matrix_rank(parts / parts.max(axis=0)) == 3 or tokens < 7


@pytest.mark.parametrize(("tokens", "longest"), [(1, 1), (100, 7), (100, 1000), (5000, 5000)])
def test_random_documents_fill_the_pack(tokens: int, longest: int) -> None:
    lengths = random_lengths(np.random.default_rng(0), tokens, longest)
    assert sum(lengths) == tokens and 1 <= min(lengths) and max(lengths) <= longest
    assert random_lengths(np.random.default_rng(0), 0, longest) == ()


@pytest.mark.parametrize(("most", "unit"), [(5e6, 4), (5e6, 2 * 63), (100.0, 4), (1.0, 2), (1e9, 14)])
def test_sizes_are_whole_elements_for_each_rank_up_to_what_is_needed(most: float, unit: int) -> None:
    sizes = byte_sizes(most, unit)
    assert all(size % unit == 0 for size in sizes) and sizes == sorted(set(sizes)) and sizes[0] <= max(unit, 1024 + unit)
    assert sizes[-1] == pytest.approx(max(most, unit), abs=unit)


def test_the_median_of_rounds_counts_and_the_first_round_does_not() -> None:
    rounds = iter([[100.0, 1.0], [1.0, 5.0], [9.0, 6.0], [2.0, 7.0]])
    seen: list[tuple[int, int]] = []

    def run(clock: Clock) -> list[float]:
        assert all(0 <= clock.time(lambda: None) < 10 for _ in range(2))
        return next(rounds)

    other = Probe(0, lambda clock: [])
    two, none = measure([Probe(2, run), other], 3, ALONE, lambda done, total: seen.append((done, total)))
    assert two.tolist() == [2.0, 6.0] and len(none) == 0
    assert seen == [(done, 8) for done in range(1, 9)]


def test_packs_are_timed_while_an_engine_has_them_but_for_the_last() -> None:
    begun = []
    clock = Clock(ALONE, lambda: begun.append(len(read)))
    read: list[int] = []
    packs = TimedPacks([10, 11, 12], clock)
    for batch in packs:
        read.append(batch)
    assert read == [10, 11, 12] and len(packs) == 3
    assert len(packs.seconds) == 2 and min(packs.seconds) >= 0 and begun == [1, 2]


def calibrated(world: World, path: Path, overrides: Sequence[str], replaced: Callable[..., list[Array]] | None = None) -> Calibration:
    setup = prepare(load_config(path, list(overrides)))
    if replaced is None:
        return calibrate(setup, build_grid(setup, world), rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "measure", replaced)
        return calibrate(setup, build_grid(setup, world), rounds=1)


TRUTH = CostModel(
    32,
    per_token=2e-5,
    per_token_squared=3e-7,
    efficiency_tokens=(16.0, 32.0),
    efficiency=(0.5, 1.0),
    per_pack=1e-3,
    per_step=7e-3,
    attention=AttentionShape(2, 4, 2, 8, 4, 1),
    all_to_all=(Curve((1024.0, 4096.0), (1e-4, 3e-4)),),
    ring_step=Curve((1024.0, 4096.0, 8192.0), (1e-4, 2e-4, 5e-4)),
)
"""Of the tiny run on two data ranks."""


def measured_as_if(probes: Sequence[Probe], rounds: int, world: World, progress: Callable[[int, int], None]) -> list[Array]:
    """What ``measure`` would return on a machine that ``TRUTH`` describes."""
    packs, step, attention, *exchanges = probes
    draw = np.random.default_rng(0)
    others = [random_lengths(draw, 32, 32) for _ in range(3)]
    alone = seconds_of(TRUTH, [*(trial.lengths for trial in designed_trials(32)), *others])
    lengths = np.array([32, *random_lengths(draw, 32, 32)])
    shared = float(TRUTH.pack_seconds(TRUTH.work(lengths).sum(), 64, 2))
    assert (packs.count, step.count, attention.count) == (len(alone) + 1, 1, 2)
    assert [each.count for each in exchanges] == [2, 3]
    documents = 1e-7 * np.array(TRUTH.efficiency_tokens) ** 2 / np.array(TRUTH.efficiency)
    curves = [np.array(curve.seconds) for curve in (*TRUTH.all_to_all, TRUTH.ring_step)]
    return [np.array([*alone, shared]), np.array([TRUTH.per_step]), documents, *curves]


def numbers(value: object) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict | list | tuple):
        return [number for each in (value.values() if isinstance(value, dict) else value) for number in numbers(each)]
    return [float(value)]


def test_every_measurement_goes_where_it_belongs(run_ranks: RunRanks, tmp_path: Path) -> None:
    first, second = run_ranks(2, calibrated, write_run(tmp_path), [], measured_as_if)
    assert first.cost == second.cost
    assert numbers(cost_to_json(first.cost)) == pytest.approx(numbers(cost_to_json(TRUTH)), rel=1e-9)
    assert len(first.checks) == 4 and all(abs(check.error) < 1e-9 for check in first.checks)
    assert first.fit.worst < 1e-9


def assert_usable(result: Calibration, tmp_path: Path) -> None:
    """Finite, not negative, and equal when it is read back."""
    write_json(tmp_path / "costs.json", {"about": {}, **cost_to_json(result.cost)})
    assert load_cost_model(str(tmp_path / "costs.json")) == result.cost
    assert all(np.isfinite(number) and number >= 0 for number in numbers(json.loads((tmp_path / "costs.json").read_text("utf-8"))))
    cost = result.cost
    assert cost.per_pack + cost.per_token + cost.per_token_squared > 0 and cost.per_step > 0
    assert all(0 < rate <= 1 for rate in cost.efficiency) and max(cost.efficiency) == 1.0
    assert all(min(curve.seconds) > 0 for curve in (*cost.all_to_all, cost.ring_step) if curve.seconds)
    assert all(check.measured > 0 and check.predicted > 0 for check in result.checks)


@pytest.mark.parametrize(
    ("overrides", "curves", "checks"),
    [
        (["planning.policy=adaptive"], 1, 4),
        (["model.num_heads=1", "model.num_kv_heads=1", "planning.largest_degree=2"], 0, 4),
        (["parallel.pp=2"], 0, 3),
        (["parallel.tp=2", "parallel.sequence_parallel_activations=true", "train.activation_checkpointing=full"], 0, 3),
    ],
    ids=["dp2", "dp2-ring", "pp2", "tp2"],
)
def test_two_ranks_measure_a_model_that_a_run_can_read(
    run_ranks: RunRanks, tmp_path: Path, overrides: list[str], curves: int, checks: int
) -> None:
    first, second = run_ranks(2, calibrated, write_run(tmp_path), overrides)
    assert first.cost == second.cost and first.checks == second.checks
    assert_usable(first, tmp_path)
    assert len(first.cost.all_to_all) == curves and len(first.checks) == checks
    assert bool(first.cost.ring_step.bytes) == (checks == 4)
    assert first.cost.tokens_per_rank == 32 and "float32" in first.chosen["dtype"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (3, ["train.dtype=bfloat16"]),
        (4, ["parallel.pp=2"]),
        (4, ["optimizer.sharding=zero1"]),
        (2, ["optimizer.sharding=zero3"]),
    ],
    ids=["dp3", "pp2dp2", "zero1", "zero3"],
)
def test_other_grids_and_engines(run_ranks: RunRanks, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    results = run_ranks(ranks, calibrated, write_run(tmp_path), overrides)
    assert all(each.cost == results[0].cost for each in results)
    assert_usable(results[0], tmp_path)
