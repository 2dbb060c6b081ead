import pytest

from megatron_ext.planning import CostModel, Pack, Plan, Slice
from megatron_ext.planning.cost_model import AttentionShape, Curve
from megatron_ext.planning.timeline import pack_seconds, timeline
from megatron_ext.train.cost_correction import LARGEST, CostCorrection
from tests.grids import ALONE

COST = CostModel(1000, per_token=1e-3, attention=AttentionShape(2, 8, 8, 16), all_to_all=(Curve.line(1e-3, 1e6), Curve.line(1e-3, 1e5)))
PLANS = [
    Plan(4, (Pack(0, 1, (Slice(0, 0, 900),)),)),
    Plan(4, (Pack(0, 4, (Slice(0, 0, 800),)), Pack(0, 1, (Slice(1, 0, 100),)))),
    Plan(4, (Pack(0, 1, (Slice(0, 0, 10),)), Pack(1, 1, (Slice(1, 0, 100),)), Pack(0, 2, (Slice(2, 0, 60),)))),
    Plan(4, ()),
]


def seconds(plan: Plan, rank: int, cost: CostModel) -> float:
    """When a rank is done with its packs, where ``cost`` is the truth."""
    times = timeline(plan, pack_seconds(plan, cost))
    return max([0.0, *(end for pack, end in zip(plan.packs, times.end, strict=True) if rank in pack.ranks)])


def fitted(true: CostModel) -> CostCorrection:
    correction = CostCorrection(COST)
    correction.add(PLANS[0], 0, COST, 1e9)  # the first step is not like the others
    for _ in range(4):
        for plan in PLANS:
            correction.add(plan, 0, correction.corrected(COST), seconds(plan, 0, true))
        correction.fit(ALONE)
    return correction


def test_factors_of_a_machine_are_found() -> None:
    correction = fitted(COST.scaled(1.7, 0.4))
    assert correction.compute == pytest.approx(1.7, rel=0.02) and correction.exchange == pytest.approx(0.4, rel=0.15)
    perfect = fitted(COST)
    assert (perfect.compute, perfect.exchange) == pytest.approx((1.0, 1.0)), "waiting for another rank is nobody's cost"


def test_what_was_not_seen_stays_as_it_was() -> None:
    correction = CostCorrection(COST)
    correction.fit(ALONE)
    assert (correction.compute, correction.exchange) == (1.0, 1.0)
    for _ in range(2):
        correction.add(PLANS[0], 0, COST, 3 * seconds(PLANS[0], 0, COST))
    correction.fit(ALONE)
    assert correction.compute == pytest.approx(3.0, rel=0.05) and correction.exchange == pytest.approx(1.0)


def test_a_stalled_machine_does_not_spoil_plans() -> None:
    assert fitted(COST.scaled(1e6, 1.0)).compute == LARGEST


def test_factors_are_those_of_one_model() -> None:
    state = fitted(COST.scaled(2.0, 1.0)).state()
    same, other = CostCorrection(COST), CostCorrection(COST.scaled(1.0, 2.0))
    for correction in (same, other):
        correction.load(state)
    assert same.compute == state["compute"] and other.compute == 1.0
    same.load(None)
    assert same.compute == state["compute"]
