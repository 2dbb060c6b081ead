from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.planning.bounds import lower_bound
from megatron_ext.planning.cost_model import AttentionShape, CostModel, Curve
from megatron_ext.planning.judge import Overheads, Truth, judge, perturbed
from megatron_ext.planning.plan import Pack, Plan, Slice
from megatron_ext.planning.presets import Memory
from megatron_ext.planning.timeline import pack_seconds, timeline

COST = CostModel(
    tokens_per_rank=1000,
    per_token=1e-3,
    per_token_squared=1e-6,
    per_pack=0.5,
    per_step=0.25,
    attention=AttentionShape(layers=3, query_heads=4, kv_heads=4, head_dim=8),
    all_to_all=(Curve.line(0.0, 1e6), Curve.line(0.0, 5e5)),
)
MEMORY = Memory(states=500.0, bytes_per_token=2.0, limit=2500.0)
OVERHEADS = Overheads(tile=100, half_rate_tokens=50, launch=1e-3, message=1e-4, layer_sync=0.01, switch=0.125)
NOTHING = Overheads(tile=1, half_rate_tokens=0, launch=0.0, message=0.0, layer_sync=0.0, switch=0.0)
LENGTHS = [301, 250, 120]
PLAN = Plan(2, (Pack(0, 2, (Slice(0, 0, 301),)), Pack(0, 1, (Slice(1, 0, 250),)), Pack(1, 1, (Slice(2, 0, 120),))), in_rounds=True)


def by_hand() -> tuple[float, float]:
    """Seconds of the step, and rank-seconds of exchanges."""
    # Round 1: 301 tokens on two ranks: 151 of them on one; 4 tiles. Two all-to-alls in 3 layers, forward and backward.
    sent = 151 * 8 * 2 * 0.5
    exchange = 3 * 2 * (sent * 12 / 1e6 + sent * 4 / 1e6) + 3 * 2 * 2 * (1e-3 + 1e-4)
    linear, attention = 0.5 + 0.151, 1e-6 * 400 * (400 + 50) / 2
    first = linear + attention + exchange
    # Round 2: both ranks changed their blocks. Forward is 1 / 3 of linear work and 1 / 3.5 of attention; the slowest sets the pace.
    packs = [(0.5 + 0.125 + 0.25, 1e-6 * 300 * 350), (0.5 + 0.125 + 0.12, 1e-6 * 200 * 250)]
    forward = max(linear / 3 + attention / 3.5 for linear, attention in packs)
    backward = max(linear * 2 / 3 + attention * 2.5 / 3.5 for linear, attention in packs)
    return first + forward + backward + 2 * (0.01 * 3 * 2) + 0.25, 2 * exchange


def test_a_small_plan_by_hand() -> None:
    verdict = judge(PLAN, LENGTHS, Truth(COST, MEMORY, OVERHEADS))
    seconds, exchange = by_hand()
    assert verdict.seconds == pytest.approx(seconds, rel=1e-13)
    assert verdict.exchange == pytest.approx(exchange / (2 * seconds), rel=1e-13)
    assert verdict.oom == () and verdict.switches == 2
    assert verdict.peak_bytes == 500 + 2 * 250
    busy = (verdict.timeline.end - verdict.timeline.begin) @ [2, 1, 1]
    assert verdict.idle == pytest.approx(1 - (busy + 2 * 0.25) / (2 * seconds))


def test_forward_and_backward_wait_for_different_packs() -> None:
    """A pack of long documents is slow backward, one of short ones forward: together they take longer than either."""
    cost = replace(COST, per_pack=0.0, per_step=0.0, all_to_all=())
    plan = Plan(2, (Pack(0, 1, (Slice(0, 0, 1000),)), Pack(1, 1, tuple(Slice(d, 0, 1) for d in range(1, 2000)))), in_rounds=True)
    verdict = judge(plan, [1000] + [1] * 1999, Truth(cost, replace(MEMORY, limit=1e9), NOTHING))
    assert verdict.seconds == pytest.approx(1.999 / 3 + 2 / 3 + 2.5 / 3.5 * 1.0, rel=0.01)
    assert verdict.seconds > max(verdict.timeline.end) + 0.04


def test_without_rounds_blocks_begin_when_their_ranks_are_free() -> None:
    plan = replace(PLAN, in_rounds=False)
    truth = Truth(COST, MEMORY, NOTHING, lock_step=False)
    even = replace(plan, packs=(Pack(0, 2, (Slice(0, 0, 300),)), *plan.packs[1:]))
    believed = timeline(even, pack_seconds(even, COST), COST.per_step)
    verdict = judge(even, [300, 250, 120], truth)
    assert verdict.seconds == pytest.approx(believed.seconds, rel=1e-12)
    assert verdict.timeline.begin == pytest.approx(believed.begin)


def test_a_plan_without_rounds_is_refused_where_ranks_meet() -> None:
    with pytest.raises(ConfigError, match=r"plan\.in_rounds: false; accepted: true"):
        judge(replace(PLAN, in_rounds=False), LENGTHS, Truth(COST, MEMORY))


def test_a_plan_of_other_documents_is_refused() -> None:
    with pytest.raises(ConfigError, match="document 2: 120 of 121 tokens"):
        judge(PLAN, [301, 250, 121], Truth(COST, MEMORY))
    with pytest.raises(ConfigError, match="pack 0: a ring of 2; accepted: 1 for 2 ranks"):
        judge(replace(PLAN, packs=(replace(PLAN.packs[0], ring=2), *PLAN.packs[1:])), LENGTHS, Truth(COST, MEMORY))


def test_too_little_memory_is_reported_and_not_dropped() -> None:
    verdict = judge(PLAN, LENGTHS, Truth(COST, replace(MEMORY, limit=999.0), OVERHEADS))
    assert verdict.oom == (1,) and verdict.seconds == float("inf")
    assert verdict.timeline.seconds == pytest.approx(by_hand()[0]), "what it would have taken is still there"
    assert judge(PLAN, LENGTHS, Truth(COST, replace(MEMORY, limit=1000.0), OVERHEADS)).oom == ()
    uneven = judge(PLAN, LENGTHS, Truth(COST, replace(MEMORY, limit=801.0), OVERHEADS))
    assert uneven.oom == (0, 1), "the rank with the odd token counts: 151 tokens, where 150.5 would fit"


def test_an_empty_step_takes_what_a_step_takes() -> None:
    assert judge(Plan(4, ()), [], Truth(COST, MEMORY, lock_step=False)).seconds == 0.25


@st.composite
def steps(draw: st.DrawFn) -> tuple[Plan, list[int]]:
    """Random plans with random blocks, on 4 ranks."""
    blocks = draw(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 400), max_size=5)), max_size=8))
    packs, lengths = [], []
    for rank, degree, documents in blocks:
        packs.append(Pack(rank // degree * degree, degree, tuple(Slice(len(lengths) + d, 0, n) for d, n in enumerate(documents))))
        lengths += documents
    return Plan(4, tuple(packs)), lengths


@given(steps(), st.booleans(), st.floats(0, 0.5), st.integers(0, 100))
def test_no_plan_is_judged_faster_than_any_lower_bound(step: tuple[Plan, list[int]], rounds: bool, amount: float, seed: int) -> None:
    plan, lengths = step
    plan = plan.by_rounds(at_least=1) if rounds else plan
    truth = Truth(perturbed(COST, amount, seed), replace(MEMORY, limit=1e9), lock_step=rounds)
    verdict = judge(plan, lengths, truth)
    minorant = truth.minorant
    assert verdict.seconds >= timeline(plan, pack_seconds(plan, minorant), minorant.per_step).seconds * (1 - 1e-12)
    # By itself, without any of the project's bounds: all work divided evenly, and the longest document on all ranks.
    work = [minorant.per_token * n + minorant.per_token_squared * n * n for n in lengths]
    assert verdict.seconds >= minorant.per_step + sum(work) / 4 * (1 - 1e-12)
    assert not lengths or verdict.seconds >= (minorant.per_step + minorant.per_pack + max(work) / 4) * (1 - 1e-12)
    assert 0 <= verdict.idle <= 1 and 0 <= verdict.exchange <= 1


@given(steps(), st.booleans())
def test_no_plan_is_judged_faster_than_the_bound_of_the_minorant(step: tuple[Plan, list[int]], rounds: bool) -> None:
    plan, lengths = step
    plan = plan.by_rounds(at_least=1) if rounds else plan
    truth = Truth(COST, replace(MEMORY, limit=1e9), lock_step=rounds)
    bound = truth.cost.per_step + lower_bound(lengths, 4, truth.minorant, in_rounds=rounds)
    assert judge(plan, lengths, truth).seconds >= bound * (1 - 1e-9)


@given(steps())
def test_every_overhead_only_adds(step: tuple[Plan, list[int]]) -> None:
    plan, lengths = step
    plan = plan.by_rounds(at_least=1)
    room = replace(MEMORY, limit=1e9)
    least = judge(plan, lengths, Truth(COST, room, NOTHING)).seconds
    for name in ("tile", "half_rate_tokens", "launch", "message", "layer_sync", "switch"):
        one = replace(NOTHING, **{name: getattr(OVERHEADS, name)})
        assert judge(plan, lengths, Truth(COST, room, one)).seconds >= least - 1e-12


def test_ranks_with_more_heads_set_the_pace() -> None:
    cost = replace(COST, attention=AttentionShape(layers=3, query_heads=3, kv_heads=3, head_dim=8), all_to_all=())
    plan = Plan(2, (Pack(0, 2, (Slice(0, 0, 300),)),), in_rounds=True)
    even, odd = (judge(plan, [300], Truth(each, MEMORY, NOTHING)).seconds for each in (replace(COST, all_to_all=()), cost))
    assert even == pytest.approx(0.25 + 0.5 + 0.15 + 1e-6 * 300**2 / 2)
    assert odd == pytest.approx(0.25 + 0.5 + 0.15 + 1e-6 * 300**2 / 2 * 4 / 3)


def test_truth_errs_by_exactly_the_share_and_again_by_the_same() -> None:
    true = perturbed(COST, 0.2, 7)
    factors = [true.per_token / 1e-3, true.per_token_squared / 1e-6, true.per_pack / 0.5]
    factors += [float(curve(1e6) / believed(1e6)) for curve, believed in zip(true.all_to_all, COST.all_to_all, strict=True)]
    assert np.abs(np.array(factors) - 1) == pytest.approx([0.2] * 5)
    assert perturbed(COST, 0.2, 7) == true
    assert len({perturbed(COST, 0.2, seed).per_token for seed in range(20)}) == 2
    assert perturbed(COST, 0.0, 7) == COST
    with pytest.raises(ConfigError, match=r"perturb: 1\.0; accepted: at least 0 and below 1"):
        perturbed(COST, 1.0, 0)
