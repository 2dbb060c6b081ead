"""Lengths of documents in, plans out. Needs only numpy."""

from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.plan import Pack, Plan, Slice
from megatron_ext.planning.policies import plan_step

__all__ = ["CostModel", "Pack", "Plan", "Slice", "plan_step"]
