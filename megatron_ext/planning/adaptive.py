"""The adaptive policy: packs of different degrees, planned together for the whole step; the best static plan where that gains too little.

The problem is that of FlexSP (Wang et al. 2024, arXiv:2412.01523), which solves a mixed-integer program for each micro-batch; here
compiled greedy planners meet a target that is searched, within milliseconds, and :func:`lower_bound` says how much is left.
"""

from megatron_ext.planning.assignment import Assignment
from megatron_ext.planning.packing import pack_best_fit
from megatron_ext.planning.static import best_static, static
from megatron_ext.planning.step import Step


def adaptive(step: Step, margin: float) -> tuple[Assignment, str]:
    """The adaptive assignment, or the best static one if the adaptive one is not predicted to take less than 1 - ``margin`` of it.

    Args:
        step: what there is to plan.
        margin: share of the best static assignment's seconds.

    Returns:
        The assignment and the name of the policy that made it: ``adaptive`` or ``best_static``.

    Raises:
        ConfigError: a document that fits no block.
    """
    from megatron_ext.planning.best_fit_kernel import pack_compiled
    from megatron_ext.planning.borderless import plan_borderless
    from megatron_ext.planning.rounds import plan_rounds

    step.require_room()
    if not step.lengths.any():
        return static(step, 1), "best_static"
    made = plan_rounds(step) if step.in_rounds else plan_borderless(step)
    enough = made.seconds(step) / (1.0 - margin)
    fallback = best_static(step, pack_compiled, below=enough)
    return (made, "adaptive") if fallback is None else (fallback[0], "best_static")


def static_assignment(step: Step, compiled: bool = False) -> Assignment:
    """The best static assignment of a step; the same ``compiled`` or not, which is faster for many documents and loads numba.

    Raises:
        ConfigError: a document that fits no block.
    """
    packer = pack_best_fit
    if compiled:
        from megatron_ext.planning.best_fit_kernel import pack_compiled as packer
    best = best_static(step, packer)
    assert best is not None, "the largest degree holds every document"
    return best[0]
