"""What a user can say about the optimizer and the learning-rate schedule."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from typing import Literal

from megatron_ext.optim.method_options import HalfFineTuningOptions, MagnitudeGateOptions, MetaExperienceReplayOptions
from megatron_ext.option_rules import require, shown


@dataclass
class MuonOptions:
    """Of the rules ``muon`` and ``normuon``; see ``megatron_ext.optim.Muon``."""

    lr: float | None = None
    """Base learning rate; null: ``optimizer.lr``, which suits scale ``match_rms_adamw``."""
    weight_decay: float | None = None
    """Decoupled weight decay; null: ``optimizer.weight_decay``."""
    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Orthogonalize the gradient mixed with the momentum rather than the momentum."""
    coefficients: Literal["jordan", "you", "polar_express", "deepseek_v4"] = "polar_express"
    """Polynomials of Newton-Schulz."""
    ns_steps: int | None = None
    """Newton-Schulz steps; null: as many as the coefficients are made for."""
    method: Literal["standard", "gram", "auto"] = "auto"
    """Newton-Schulz on the matrix, on its Gram matrix, or on that where the aspect ratio is at least 2."""
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """Of Newton-Schulz; ``auto``: float64 for float64 models, else bfloat16 where the device is fast at it, else float32."""
    scale: Literal["match_rms_adamw", "spectral", "jordan"] = "match_rms_adamw"
    """Factor of the learning rate by shape: 0.2 sqrt(max(m, n)), sqrt(max(m, n)), or sqrt(max(1, m / n))."""
    split_heads: bool = False
    """Orthogonalize each head of q, k and v by itself."""
    beta2: float = 0.95
    """normuon: decay of the second moment of the rows."""
    tp_mode: Literal["gather", "blockwise"] = "gather"
    """``gather``: matrices divided over tensor-parallel ranks are updated whole. ``blockwise``: each part as if it were a matrix, which
    moves no data and changes the result."""

    def __post_init__(self) -> None:
        require(
            (self.lr is None or self.lr >= 0, "lr", self.lr, "at least 0, or null"),
            (self.weight_decay is None or self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0, or null"),
            (0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and less than 1"),
            (self.ns_steps is None or self.ns_steps >= 1, "ns_steps", self.ns_steps, "at least 1, or null"),
            (0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and less than 1"),
        )


@dataclass
class AdamPOptions:
    """Of the rule ``adamp``, beside ``optimizer.betas`` and ``eps``; see ``megatron_ext.optim.AdamP``."""

    lr: float | None = None
    """Base learning rate; null: ``optimizer.lr``."""
    delta: float = 0.1
    """A cosine of gradient and parameter below delta / sqrt(size) means that the scale of the row or matrix does not matter."""
    wd_ratio: float = 0.1
    """Strength of the weight decay of what is projected."""
    nesterov: bool = False
    """Use the first moment of the next step."""
    fused: bool = False
    """The C++ step on CPUs, built when first used; needs a compiler and float32 masters."""

    def __post_init__(self) -> None:
        require(
            (self.lr is None or self.lr >= 0, "lr", self.lr, "at least 0, or null"),
            (self.delta >= 0, "delta", self.delta, "at least 0"),
            (0 <= self.wd_ratio <= 1, "wd_ratio", self.wd_ratio, "between 0 and 1"),
        )


RuleName = Literal["adamw", "adamp", "muon", "normuon"]


@dataclass
class OptimizerOptions:
    """Update rules on float32 master weights, each rank owning a part of them."""

    rule: RuleName = "adamw"
    """``adamw`` (Loshchilov and Hutter 2019), ``adamp`` (Heo et al. 2021): of all matrices; ``muon`` (Jordan et al. 2024), ``normuon``
    (Li et al. 2025): of hidden matrices, with adamw for embedding and head. Norms and biases are adamw's."""
    routes: dict[str, RuleName] = field(default_factory=dict)
    """Rules by pattern of parameter names (``*.k_proj.weight``), over what ``rule`` says; the last pattern that fits decides."""
    lr: float = 3e-4
    """Base learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    adamw: Literal["torch", "apex"] = "torch"
    """What computes adamw: PyTorch's fused step, or that of NVIDIA's apex on GPUs, where it is installed."""
    muon: MuonOptions = field(default_factory=MuonOptions)
    """Of muon and normuon."""
    adamp: AdamPOptions = field(default_factory=AdamPOptions)
    """Of adamp."""
    qk_clip: float | None = None
    """Scale q and k of heads down whose largest attention logit of the step exceeds this (Kimi K2, arXiv:2507.20534: 100); null: never.
    The logits are computed once more for it."""
    qk_clip_alpha: float = 0.5
    """Share of that scaling, as an exponent, that q takes; k takes the rest."""
    clip_norm: float = 1.0
    """Largest global gradient norm before the update; 0 switches clipping off."""
    sharding: Literal["whole_tensor", "zero1", "zero2", "zero3"] = "whole_tensor"
    """``whole_tensor``: each rank owns some rows or matrices of the master weights and moments; ``zero1``, ``zero2`` (gradients too),
    ``zero3`` (parameters too): DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), for models that fit no other way."""
    overlap_reduction: bool = True
    """Send gradients to their owners while the rest of the last backward pass computes; on GPUs only where no packs are shared."""

    half_fine_tuning: HalfFineTuningOptions | None = None
    """Freeze half of every block, drawn anew at each stage; null: train all."""
    magnitude_gate: MagnitudeGateOptions | None = None
    """Freeze the rows of linears whose outputs are small in the step; null: train all."""
    meta_experience_replay: MetaExperienceReplayOptions | None = None
    """Go part of the way back every some steps; null: never."""

    @property
    def methods(self) -> list[str]:
        """Keys of the methods that are switched on and need whole_tensor, whose owners see parts of parameters by name."""
        keys = ("half_fine_tuning", "magnitude_gate", "meta_experience_replay")
        return [key for key in keys if getattr(self, key) is not None]

    def _method_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        """Of methods that would undo each other: what is frozen stays as it is, whoever else wants to move it."""
        replay, half, freezes = self.meta_experience_replay, self.half_fine_tuning, self.half_fine_tuning or self.magnitude_gate
        yield (
            self.qk_clip is None or freezes is None,
            "qk_clip",
            self.qk_clip,
            "null with half_fine_tuning or magnitude_gate: a head of which some rows are frozen would be bent and not scaled",
        )
        yield (
            replay is None or self.magnitude_gate is None,
            "magnitude_gate",
            "set",
            "null with meta_experience_replay: rows that are frozen when it is due would never go back",
        )
        whole = replay is None or half is None or half.stage_steps % replay.every == 0
        accepted = f"a multiple of meta_experience_replay.every ({replay and replay.every})"
        yield whole, "half_fine_tuning.stage_steps", half and half.stage_steps, f"{accepted}, so that what it moves was trained throughout"

    @property
    def rules(self) -> set[str]:
        """Names of the rules that are asked for, beside adamw."""
        return {self.rule, *self.routes.values()} - {"adamw"}

    def base_lr(self, rule: RuleName) -> float:
        """Base learning rate of a rule."""
        own = {"adamw": None, "adamp": self.adamp.lr, "muon": self.muon.lr, "normuon": self.muon.lr}[rule]
        return self.lr if own is None else own

    def __post_init__(self) -> None:
        wanted = ", ".join(sorted(self.rules))
        require(
            (self.lr >= 0, "lr", self.lr, "at least 0"),
            (all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers, each at least 0 and less than 1"),
            (self.eps > 0, "eps", self.eps, "more than 0"),
            (self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0"),
            (self.qk_clip is None or self.qk_clip > 0, "qk_clip", self.qk_clip, "more than 0, or null"),
            (
                self.qk_clip is None or self.sharding == "whole_tensor",
                "qk_clip",
                self.qk_clip,
                "null with ZeRO, which has no rows to scale",
            ),
            (
                self.adamw == "torch" or self.sharding == "whole_tensor",
                "adamw",
                self.adamw,
                "torch with ZeRO, which counts steps in one flat tensor",
            ),
            (
                not self.methods or self.sharding == "whole_tensor",
                "sharding",
                self.sharding,
                f"whole_tensor with {', '.join(self.methods)}: ZeRO hands out slices of one flat tensor, which have no names and no rows",
            ),
            (
                self.half_fine_tuning is None or self.adamw == "torch",
                "adamw",
                self.adamw,
                "torch with half_fine_tuning: apex counts the steps of all parameters together",
            ),
            *self._method_rules(),
            (0 <= self.qk_clip_alpha <= 1, "qk_clip_alpha", self.qk_clip_alpha, "between 0 and 1"),
            (self.clip_norm >= 0, "clip_norm", self.clip_norm, "at least 0; 0 switches clipping off"),
            (
                self.sharding == "whole_tensor" or not self.rules,
                "sharding",
                self.sharding,
                f"whole_tensor with {wanted}: ZeRO hands the rule slices of one flat tensor, which has no rows and no matrices",
            ),
        )


@dataclass
class ScheduleOptions:
    """Learning-rate factor by optimizer step. Give ``*_steps``; the whole length is that of the run."""

    kind: Literal["cosine", "wsd", "infinite", "constant"] = "cosine"
    """``cosine``, ``wsd`` (warm-up, stable, decay), ``infinite`` (warm-up, cool-down, constant, decay) or ``constant``; each begins with
    a linear warm-up."""
    warmup_steps: int = 0
    """Steps of the linear warm-up."""
    warmup_from: float = 0.0
    """Factor that the warm-up begins from. A run that continues a decayed one may begin where that ended."""
    decay_steps: int | None = None
    """wsd, infinite: length of the final decay; null: a tenth of the run; 0: none, for a run that others branch off."""
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt", "exponential", "inverse"] = "linear"
    """wsd, infinite: of the factor (``exponential``: of its logarithm, ``inverse``: of its inverse, both a straight line)."""
    min_factor: float = 0.1
    """Factor at the end of the decay. A moderate decay ends at 0.1 to 0.5."""
    decay_ends: list[int] = field(default_factory=list)
    """cosine, wsd: steps at which earlier decays end. After each the rate rises and decays again; the last one ends with the run."""
    rewarm_steps: int = 0
    """Steps of the linear rise from ``min_factor`` after each of ``decay_ends``; 0: at once, as WSD-S does."""
    cooldown_steps: int = 0
    """infinite: length of the fall from 1 to ``constant_factor``, after the warm-up; 0 with a ``constant_factor`` of 1."""
    cooldown_shape: Literal["inverse_sqrt", "cosine", "linear"] = "inverse_sqrt"
    """infinite: ``inverse_sqrt``, ``cosine`` or ``linear``."""
    cooldown_steepness: float = 10.0
    """infinite: alpha of the shape ``inverse_sqrt``; the larger, the more of the fall comes first."""
    constant_factor: float = 0.5
    """infinite: factor of the constant phase."""

    def period(self, step: int, total_steps: int) -> tuple[int, int]:
        """The steps from one warm-up to the next that ``step`` is among: those after the first of the two numbers, up to the second."""
        begin = max((end for end in self.decay_ends if end < step), default=0)
        return begin, min((end for end in self.decay_ends if end >= step), default=total_steps)

    def warmup(self, begin: int) -> tuple[int, float]:
        """Steps of the warm-up of the period after step ``begin``, and the factor that it begins from."""
        return (self.rewarm_steps, self.min_factor) if begin else (self.warmup_steps, self.warmup_from)

    def decay_length(self, period: int) -> int:
        """wsd, infinite: steps of the decay at the end of a period of so many steps."""
        return max(1, period // 10) if self.decay_steps is None else self.decay_steps

    def rules_of_length(self, total_steps: int) -> list[tuple[bool, str, object, str]]:
        """What a run of ``total_steps`` steps adds to the rules, as ``require`` takes them."""
        if self.decay_ends and self.decay_ends[-1] >= total_steps:
            return [(False, "decay_ends", self.decay_ends, f"steps before the last of the run ({total_steps})")]
        periods = [self.period(end, total_steps) for end in [*self.decay_ends, total_steps]]
        shortest = min(end - begin - self.warmup(begin)[0] for begin, end in periods)
        first = periods[0][1]
        decays = all(self.decay_length(end - begin) <= end - begin - self.warmup(begin)[0] for begin, end in periods)
        whole = "of the run" if not self.decay_ends else "up to the first of decay_ends"
        cooldown = self.cooldown_steps + self.decay_length(first) if self.kind == "infinite" else 0
        beside = f"at most {total_steps} steps less {self.warmup_steps} of warm-up"
        if self.decay_ends:
            beside = f"at most {shortest}, the fewest steps between a warm-up and the end of its decay"
        return [
            (self.warmup_steps <= first, "warmup_steps", self.warmup_steps, f"at most the {first} steps {whole}"),
            (
                self.warmup_steps > first or shortest >= 0,
                "rewarm_steps",
                self.rewarm_steps,
                "at most the steps from one decay's end to the next",
            ),
            (decays or self.kind not in ("wsd", "infinite"), "decay_steps", self.decay_steps, beside),
            (
                not self.cooldown_steps or self.warmup_steps + cooldown <= first,
                "cooldown_steps",
                self.cooldown_steps,
                f"at most {total_steps} steps less {self.warmup_steps} of warm-up and {self.decay_length(first)} of decay",
            ),
        ]

    def _kind_rules(self) -> Iterator[tuple[bool, str, object, str]]:
        """That nothing is said about phases that the schedule does not have, where nobody would heed it."""
        decaying, any_period = ("wsd", "infinite"), ("cosine", "wsd")
        heeded_by = {
            "decay_steps": decaying,
            "decay_shape": decaying,
            "min_factor": ("cosine", *decaying),
            "decay_ends": any_period,
            "rewarm_steps": any_period,
            **dict.fromkeys(("cooldown_steps", "cooldown_shape", "cooldown_steepness", "constant_factor"), ("infinite",)),
        }
        for each in fields(self):
            kinds, value = heeded_by.get(each.name), getattr(self, each.name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            heeded = kinds is None or self.kind in kinds
            not_here = f"nothing (it is {shown(default)}), because kind {self.kind} does not heed it"
            yield heeded or value == default, each.name, value, f"{not_here}; kinds that do: {', '.join(kinds or ())}"

    def __post_init__(self) -> None:
        infinite = self.kind == "infinite"
        ends = [0, *self.decay_ends]
        logarithmic = self.kind in ("wsd", "infinite") and self.decay_shape in ("exponential", "inverse")
        require(
            *self._kind_rules(),
            (self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0"),
            (0 <= self.warmup_from <= 1, "warmup_from", self.warmup_from, "between 0 and 1"),
            (self.decay_steps is None or self.decay_steps >= 0, "decay_steps", self.decay_steps, "at least 0 (no decay), or null"),
            (0 <= self.min_factor <= 1, "min_factor", self.min_factor, "between 0 and 1"),
            (self.min_factor > 0 or not logarithmic, "min_factor", self.min_factor, f"more than 0 with decay_shape {self.decay_shape}"),
            (all(a < b for a, b in pairwise(ends)), "decay_ends", self.decay_ends, "steps, each later than the one before"),
            (
                self.decay_steps != 0 or not self.decay_ends,
                "decay_steps",
                self.decay_steps,
                "at least 1 with decay_ends, or null",
            ),
            (self.rewarm_steps >= 0, "rewarm_steps", self.rewarm_steps, "at least 0"),
            (self.rewarm_steps <= 0 or bool(self.decay_ends), "rewarm_steps", self.rewarm_steps, "0 without decay_ends"),
            (self.cooldown_steps >= 0, "cooldown_steps", self.cooldown_steps, "at least 0"),
            (
                not infinite or self.cooldown_steps != 0 or self.constant_factor == 1,
                "cooldown_steps",
                self.cooldown_steps,
                f"at least 1, or the rate would jump from 1 to constant_factor ({self.constant_factor}) at once; 0 where that is 1",
            ),
            (self.cooldown_steepness > 0, "cooldown_steepness", self.cooldown_steepness, "more than 0"),
            (0 < self.constant_factor <= 1, "constant_factor", self.constant_factor, "more than 0, at most 1"),
            (
                not infinite or self.min_factor <= self.constant_factor,
                "min_factor",
                self.min_factor,
                f"at most constant_factor ({self.constant_factor})",
            ),
        )
