"""Update rules, which rank owns which parameter, and learning-rate schedules."""

from megatron_ext.optim.adamp import SGDP, AdamP
from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.muon import Muon

__all__ = ["SGDP", "AdamP", "AdamW", "Muon"]
