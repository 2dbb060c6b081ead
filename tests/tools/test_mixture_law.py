"""The command line that predicts the critical share."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib import image

from tests.report.fake_runs import TOKENS_PER_STEP, evaluation, start, train, write_run
from tests.tools.loading import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("mixture_law")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Five shares, six token counts: general 2.5 + 0.3 r^1.5 t^0.1 + 0.15 t^-0.4, domain 2 + 0.5 r^-0.25 t^-0.2, t in 10 M; start 2.7."""
    generator, lines = np.random.default_rng(0), ["share,tokens,general_loss,domain_loss", "0.5,0,2.7,3.4"]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        for t in 0.05 * 2.0 ** np.arange(6):
            general = 2.5 + 0.3 * share**1.5 * t**0.1 + 0.15 * t**-0.4 + 1e-3 * generator.standard_normal()
            domain = 2.0 + 0.5 * share**-0.25 * t**-0.2 + 1e-3 * generator.standard_normal()
            lines.append(f"{share},{t * 1e7},{general},{domain}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_a_table_becomes_a_prediction_a_file_and_a_picture(
    tool: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = [str(table), "--tokens", "1e8", "--tolerance", "0.01", "--replicates", "100", "--output", str(output)]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((output / "mixture_law.json").read_text())
    truth = ((2.71 - 2.5 - 0.15 * 10**-0.4) / (0.3 * 10**0.1)) ** (1 / 1.5)
    low, high = result["critical"]["interval"]
    assert low <= truth <= high and high - low < 0.05
    assert result["critical"]["tokens"] == pytest.approx(1e8) and result["accepted_general_loss"] == pytest.approx(2.71)
    assert result["laws"]["domain"]["numbers"]["p"] == pytest.approx(0.25, abs=0.02)
    assert f"tokens: {result['critical']['share']:.4f}" in printed and "6.25 times the tokens of the runs: an extrapolation" in printed
    picture = image.imread(output / "mixture_law.png")
    assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05
    assert tool.main([*arguments[:-1], str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "mixture_law.json").read_text() == (output / "mixture_law.json").read_text()


def test_run_directories_give_the_law_that_made_them(tool: ModuleType, tmp_path: Path) -> None:
    for share in (0.1, 0.25, 0.5, 0.75):
        records = [start(), evaluation(0, "prose", 2.7), evaluation(0, "code", 3.4)]
        for step in range(1, 65):
            tokens = step * TOKENS_PER_STEP
            records.append(train(step, tokens_by_source={"prose": int(tokens * (1 - share)), "code": int(tokens * share)}))
            if step % 8 == 0:
                records += [evaluation(step, "prose", 2.5 + 0.3 * share**2 + 0.4 / step), evaluation(step, "code", 2 + share**-0.5 / step)]
        write_run(tmp_path / f"share_{share}", records)
    runs = sorted(map(str, tmp_path.glob("share_*")))
    options = ["--general", "prose", "--domain", "code", "--replicates", "20", "--tokens", str(100 * TOKENS_PER_STEP)]
    assert tool.main([*runs, *options, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "mixture_law.json").read_text())
    assert result["critical"]["share"] == pytest.approx(((0.2 - 0.004) / 0.3) ** 0.5, abs=2e-3)
    assert result["laws"]["domain"]["numbers"]["p"] == pytest.approx(0.5, abs=1e-2) and result["laws"]["general"]["losses"] == 32


def test_no_share_is_said_to_be_none(tool: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(table.read_text().replace("0.5,0,2.7,3.4", "0.5,0,2.4,3.4"))
    assert tool.main([str(table), "--replicates", "20", "--output", str(tmp_path / "out")]) == 0
    assert "No share of domain data keeps the general loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0.0; accepted: more than 0"),
        (["--tolerance", "-1"], "--tolerance -1.0; accepted"),
        (["--confidence", "1"], "--confidence 1.0; accepted"),
        (["--replicates", "3"], "--replicates 3; accepted: at least 20"),
        (["--from-tokens", "1e7"], "are too few for a mixture law"),
        (["--resample", "runs"], "5 are too few for a mixture law: accepted are at least 8 different runs"),
    ],
)
def test_what_cannot_be_used_is_named(
    tool: ModuleType, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert tool.main([str(table), "--output", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_directories_need_names_of_sources(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "--general and --domain are needed with run directories" in capsys.readouterr().err
