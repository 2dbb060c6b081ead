"""Numbers as people read them, in plain ASCII."""

import math
from datetime import datetime

_SCALES = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def count(value: float) -> str:
    """A number of things to three digits: ``8.19 k``, ``1.2 M``; ``n/a`` when it was not measured."""
    if not math.isfinite(value):
        return "n/a"
    value = float(f"{value:.3g}")
    for scale, suffix in _SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def loss(value: float | None) -> str:
    """Nats per token to three decimals."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A change in percent with its sign."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:+.{decimals}f} %"


def share(value: float) -> str:
    """A part of a whole in percent, to one decimal."""
    return f"{round(100 * value, 1) + 0.0:.1f} %" if math.isfinite(value) else "n/a"  # + 0.0: no minus before zero


def number(value: float | None, decimals: int = 2) -> str:
    """A measured number, or ``n/a``."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def learning_rate(value: float) -> str:
    """Scientific notation without needless zeros: ``3e-4``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "n/a"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``4 min 12 s``, ``3 h 05 min`` or ``2 d 03 h``."""
    if not math.isfinite(seconds):
        return "n/a"
    whole = round(seconds)
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left:02d} h"
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {seconds_left:02d} s" if minutes else f"{whole} s"


def seconds(value: float) -> str:
    """A short time to three digits: ``1.58 s``, ``12.3 ms``; a long one as ``duration`` says it."""
    if not math.isfinite(value) or value >= 100:
        return duration(value)
    return f"{value:.3g} s" if value >= 0.1 or value == 0 else f"{1e3 * value:.3g} ms"


def site(name: str) -> str:
    """A place inside a block that probes look at, as words."""
    return name.replace("_proj_input", "_proj input").replace("attention_output", "attention output")


def moment(time: float) -> str:
    """A Unix time as date and minute in the local time zone."""
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M %Z")
