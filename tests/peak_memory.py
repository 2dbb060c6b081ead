"""Bytes that tensors take at once."""

from collections.abc import Callable

import torch


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that were alive at once while ``function`` ran, beyond those alive when it began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
