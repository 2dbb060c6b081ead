"""Lengths of documents in, plans out. Needs only numpy; the adaptive policy loads numba when it runs."""

from megatron_ext.planning.bounds import lower_bound
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.plan import Pack, Plan, Slice
from megatron_ext.planning.policies import Planned, plan_and_compare, plan_step

__all__ = ["CostModel", "Pack", "Plan", "Planned", "Slice", "lower_bound", "plan_and_compare", "plan_step"]
