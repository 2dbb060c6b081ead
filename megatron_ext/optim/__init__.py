"""Update rules, which rank owns which parameter, and learning-rate schedules."""

from megatron_ext.optim.adamp import SGDP, AdamP
from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.muon import Muon
from megatron_ext.optim.qk_clip import QKClip

__all__ = ["SGDP", "AdamP", "AdamW", "Muon", "QKClip"]
