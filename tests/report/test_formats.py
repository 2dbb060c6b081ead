import math

import pytest

from megatron_ext.report import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1 k"), (8192, "8.19 k"), (999_999, "1 M"), (2_243_840, "2.24 M"), (7e9, "7 B")],
)
def test_count(value: float, text: str) -> None:
    assert formats.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(3e-4, "3e-4"), (1.25e-5, "1.25e-5"), (0, "0"), (1, "1e0")])
def test_learning_rate(value: float, text: str) -> None:
    assert formats.learning_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s"), (11_100, "3 h 05 min"), (183_600, "2 d 03 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (4.2e-6, "0.0042 ms"), (0.01234, "12.3 ms"), (0.1, "0.1 s"), (1.5849, "1.58 s"), (99.94, "99.9 s"), (252, "4 min 12 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert formats.seconds(value) == text


def test_a_number_that_was_not_measured_is_said_to_be_missing() -> None:
    forms = (formats.loss, formats.percent, formats.number, formats.count, formats.duration, formats.learning_rate)
    for form in (*forms, formats.share, formats.seconds):
        assert form(math.nan) == "n/a"
    assert formats.loss(None) == formats.percent(None) == formats.number(None) == "n/a"
    assert formats.percent(1.84) == "+1.8 %"
    assert formats.percent(-36.05) == "-36.0 %"
    assert formats.share(0.0125) == "1.2 %"
    assert formats.share(-1e-9) == "0.0 %"
