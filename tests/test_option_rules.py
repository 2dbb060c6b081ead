"""Rules of options and their messages, without the configuration around them."""

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.option_rules import OptionError, Problem, one_of, require, shown


def test_every_broken_rule_is_named_and_no_other() -> None:
    with pytest.raises(ConfigError) as error:
        require((False, "lr", -1, "at least 0"), (True, "eps", 1e-8, "more than 0"), (False, "resume", "", "a directory"))
    assert isinstance(error.value, OptionError)
    assert error.value.problems == (Problem("lr", "-1", "at least 0"), Problem("resume", "''", "a directory"))
    assert str(error.value) == "lr: -1; accepted: at least 0\nresume: ''; accepted: a directory"


def test_rules_that_hold_say_nothing() -> None:
    require((True, "lr", 1, "at least 0"))
    require()


@pytest.mark.parametrize(
    ("value", "text"), [(None, "null"), (True, "true"), (False, "false"), (0.5, "0.5"), ("None", "'None'"), ([None], "[None]")]
)
def test_values_are_shown_as_the_user_writes_them(value: object, text: str) -> None:
    assert shown(value) == text


def test_long_values_are_cut() -> None:
    assert shown("x" * 79) == "'" + "x" * 76 + "..."
    assert shown("x" * 78) == repr("x" * 78)


def test_one_of_names_the_nearest_only_if_one_is_near() -> None:
    assert one_of(["cosine", "wsd"], "cosin") == "cosine, wsd; nearest: cosine"
    assert one_of(["cosine", "wsd"], "zzz") == "cosine, wsd"
