"""Which keys a resumed run has changed."""

from collections.abc import Callable

from megatron_ext.config import Change, RunConfig, changes, settings

Load = Callable[..., RunConfig]


def test_settings_are_flat_and_leave_the_place_out(load: Load) -> None:
    found = settings(load("optimizer.routes={'*.k_proj.weight': adamw}"))
    assert found["optimizer.routes"] == {"*.k_proj.weight": "adamw"} and found["optimizer.muon.momentum"] == 0.95
    assert found["data.replay"] is None and found["data.sources"][0]["weight"] == 1.0
    assert not [key for key in found if key == "run_dir" or key.startswith("checkpoint")]


def test_changes_name_what_differs_and_nothing_else(load: Load) -> None:
    before = settings(load())
    assert changes(before, settings(load("run_dir=elsewhere", "checkpoint.every=7"))) == []
    now = settings(load("optimizer.lr=1", "schedule.decay_ends=[2]", "data.replay={share: 0.5, run: r}"))
    found = {change.key: change for change in changes(before, now)}
    assert found.keys() == {"optimizer.lr", "schedule.decay_ends", "data.replay"}
    assert str(found["schedule.decay_ends"]) == "schedule.decay_ends [] -> [2]" and found["data.replay"].before is None


def test_a_key_that_only_one_version_knows_is_no_change() -> None:
    assert changes({"a": 1, "gone": 2}, {"a": 3, "new": 4}) == [Change("a", 1, 3)]
