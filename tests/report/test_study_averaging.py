"""The table of averaged checkpoints in a study."""

import json
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.study_averaging import FILE, averaging_table, losses
from megatron_ext.report.study_page import render_study
from tests.report.test_page import Page
from tests.report.test_study_forgetting import variant


def test_averages_stand_beside_what_they_change(tmp_path: Path) -> None:
    decayed = variant(tmp_path, "decayed", [((4.0, 5.0, 4.5), (6.0, 3.0, 2.0)), ((4.0, 5.0, 4.5), (6.0, 3.0, 2.0))])
    assert averaging_table([decayed]) is None and "Checkpoints averaged" not in Page(render_study("None", [decayed])).text
    for run, prose in zip(decayed.runs, (4.25, 4.75), strict=True):
        (Path(run.directory) / FILE).write_text(json.dumps({"settings": {}, "losses": {"prose": prose, "code": 2.5}}))
    table = averaging_table([decayed])
    assert table is not None and table.columns == ["prose", "prose: to the last", "code", "code: to the last"]
    assert table.rows == [[("4.500", "4.250 to 4.750"), ("0.000", "-0.250 to 0.250"), ("2.500", ""), ("0.500", "")]]
    assert "Checkpoints averaged" in Page(render_study("Averaged", [decayed])).text


def test_a_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    decayed = variant(tmp_path, "decayed", [((4.0, 5.0, 4.5), (6.0, 3.0, 2.0))])
    (Path(decayed.runs[0].directory) / FILE).write_text("[]")
    with pytest.raises(DataError, match=r"averages\.json: not the losses of averaged checkpoints"):
        losses(decayed.runs[0])
