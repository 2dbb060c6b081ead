"""The table of quantized losses in a study."""

import json
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.study import Variant
from megatron_ext.report.study_page import render_study
from megatron_ext.report.study_quantization import FILE, losses, quantization_table
from tests.report.test_page import Page
from tests.report.test_study import fake, losses_to


def variant(directory: Path, name: str, increases: tuple[float, ...]) -> Variant:
    runs = {}
    for seed, increase in enumerate(increases):
        runs[seed] = fake(directory / name / str(seed), losses_to(5.0), begin=100.0 * seed)
        (runs[seed].directory / FILE).write_text(json.dumps({"settings": {}, "losses": {"unquantized": 5.0, "W4A4": 5.0 + increase}}))
    return Variant(name, None, {}, runs)


def test_losses_of_all_seeds_stand_beside_each_other(tmp_path: Path) -> None:
    variants = [variant(tmp_path, "plain", (0.5, 0.7)), variant(tmp_path, "safe", (0.1, 0.1))]
    expected = [[("5.000", ""), ("5.600", "5.500 to 5.700")], [("5.000", ""), ("5.100", "")]]
    assert quantization_table(variants) == (["unquantized", "W4A4"], expected)
    page = Page(render_study("Rounded", variants))
    assert page.tables[1][1] == ["plain", "5.000", "5.6005.500 to 5.700"] and "After quantization" in page.text


def test_without_quantization_there_is_no_table(tmp_path: Path) -> None:
    plain = Variant("plain", None, {}, {0: fake(tmp_path / "plain", losses_to(5.0), begin=0.0)})
    assert losses(plain.runs[0]) == {}
    assert quantization_table([plain]) is None and quantization_table([variant(tmp_path, "safe", (0.1,)), plain]) is None
    assert "After quantization" not in Page(render_study("Plain", [plain])).text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"losses": 3}', '{"losses": {"W4A4": null}}'])
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    run = fake(tmp_path / "run", losses_to(5.0), begin=0.0)
    (run.directory / FILE).write_text(text)
    with pytest.raises(DataError, match=r"run/quantization\.json: not the losses of a quantized run"):
        losses(run)
