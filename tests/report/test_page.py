from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.metrics import read_run
from megatron_ext.report.page import render, write_report
from megatron_ext.report.summary import arrange
from tests.report.fake_runs import evaluation, packs_of_all_degrees, plan, shared, start, three_runs, train, write_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, attributes, the cells of each table and the texts inside figures; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.svg_texts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "h3" in self.open:
            self.titles.append(data)
        if "text" in self.open:
            self.svg_texts.append(data)


ALL_FIGURES = {
    "Validation loss by source",
    "Learning and forgetting in continual",
    "Training loss by source",
    "Learning rate",
    "Gradient norm",
    "Throughput",
    "Step time",
    "Document lengths",
    "Pack fill",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("runs")
    runs = {name: read_run(path) for name, path in three_runs(directory).items()}
    write_report([runs["pretrain"], runs["continual"]], directory / "report.html", {"without replay": runs["no_replay"]})
    return (directory / "report.html").read_text("utf-8")


SHARING_FIGURES = {
    "Ranks during the first and the last recorded step, predicted",
    "Tokens by degree",
    "Gap to the lower bound",
    "Time in exchanges",
}


def _one_run(directory: Path, *records: Any, **changes: Any) -> Page:
    return Page(render(arrange([read_run(write_run(directory / "run", [start(**changes), *records]))])))


def test_page_is_self_contained(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert links and all(value.startswith("#") for value in links)
    assert "@import" not in text and "url(" not in text.replace("url(#", "")
    assert "http://" not in text and "https://" not in text


def test_ids_are_unique_and_every_reference_has_its_target(text: str) -> None:
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    references = {value.removeprefix("#") for name, value in page.attributes if name == "xlink:href"}
    references |= {value.removeprefix("url(#").removesuffix(")") for name, value in page.attributes if name == "clip-path"}
    assert references <= set(ids)


def test_every_figure_is_there_and_every_stand_in_colour_is_gone(text: str) -> None:
    assert set(Page(text).titles) == ALL_FIGURES
    assert "#fe01" not in text
    assert text.count("var(--") > 100


def test_final_table_shows_the_numbers_of_the_runs(text: str) -> None:
    results, _, phases = Page(text).tables
    assert results[0] == ["phase", "source", "first eval", "last eval", "change", "unigram entropy", "tokens seen", "epochs"]
    assert results[3:] == [
        ["continual", "prose", "4.251", "4.327", "+1.8 %", "6.410", "184 k", "0.35"],
        ["", "code", "5.351", "3.422", "\u221236.1 %", "5.630", "553 k", "1.05"],
        ["without replay", "prose", "4.251", "5.137", "+20.9 %", "6.410", "0", "n/a"],
        ["", "code", "5.351", "3.361", "\u221237.2 %", "5.630", "737 k", "1.40"],
    ]
    steps, *rest = phases[1][2:]
    assert (phases[1][0], steps) == ("pretrain", "120 of 120")
    assert rest == ["8.19 k", "983 k", "3 min 36 s", "0", "1", "2"]


def test_curves_are_labelled_with_their_last_values(text: str) -> None:
    labels = Page(text).svg_texts
    # once in the wide and once in the narrow drawing
    for label in ("prose 4.33", "code 3.42", "prose unigram 6.41", "code unigram 5.63", "prose 5.14", "code 3.36"):
        assert labels.count(label) == 2, label
    for label in ("prose +1.8 %", "code \u221236.1 %", "prose +20.9 %", "pretrain: 2.4 k documents", "continual: 1.8 k documents"):
        assert labels.count(label) == 1, label


def test_without_a_control_nothing_is_dashed(tmp_path: Path, text: str) -> None:
    runs = [read_run(path) for path in three_runs(tmp_path).values()][:2]
    alone = render(arrange(runs))
    assert "Dashed" in text and "without replay" in text and "stroke-dasharray: 8,4" in text
    assert "Dashed" not in alone and "without replay" not in alone and "stroke-dasharray: 8,4" not in alone


def test_a_run_without_evaluations(tmp_path: Path) -> None:
    page = _one_run(tmp_path, train(1, 7.0), train(2, 6.0))
    assert "No source was evaluated in these runs." in page.text
    assert set(page.titles) == ALL_FIGURES - {"Validation loss by source", "Learning and forgetting in continual"}
    assert page.tables[0][1] == ["pretrain", "prose", "n/a", "n/a", "n/a", "6.410", "16.4 k", "0.02"]


def test_a_run_of_one_step(tmp_path: Path) -> None:
    page = _one_run(tmp_path, evaluation(0, "prose", 8.0), train(1, 7.0), evaluation(1, "prose", 6.0))
    assert page.tables[0][1][2:5] == ["8.000", "6.000", "\u221225.0 %"]
    assert "Training loss by source" in page.titles


def test_a_run_that_only_started(tmp_path: Path) -> None:
    page = _one_run(tmp_path)
    assert "pretrain has not finished a step." in page.text
    assert page.titles == []
    assert page.tables[1][1][2] == "0 of 100"


def test_numbers_that_are_not_finite_or_not_measured(tmp_path: Path) -> None:
    steps = [train(1, loss=float("nan"), grad_norm=float("inf"), tflops=None, memory_gib=None, pack_fill=None), train(2)]
    page = _one_run(tmp_path, evaluation(0, "prose", float("inf")), *steps, evaluation(2, "prose", float("nan")))
    assert page.tables[0][1][2:5] == ["n/a", "n/a", "n/a"]
    assert "Pack fill" in page.titles  # the second step has it
    assert "nan" not in page.text


def test_skipped_steps_are_marked_and_counted(tmp_path: Path) -> None:
    skip = {"kind": "event", "event": "skip", "step": 2}
    marked = _one_run(tmp_path / "a", train(1), train(2, grad_norm=float("inf")), train(3), skip)
    plain = _one_run(tmp_path / "b", train(1), train(2), train(3))
    assert "Triangles: skipped steps (1)." in marked.text
    assert "No step was skipped." in plain.text


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'$x$"
    steps = train(1, loss_by_source={evil: 5.0}, tokens_by_source={evil: 10})
    records = [
        start(evil, device=evil, attention=evil, versions={"torch": evil}, unigram_entropy={evil: 6.0}),
        evaluation(0, evil, 9.0),
        steps,
    ]
    directory = write_run(tmp_path / "run", [*records, evaluation(1, evil, 8.0, split=evil)], config={"key": evil})
    run = read_run(directory)
    text = render(arrange([run, run], {evil: run}))
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count("<script>alert(1)</script>") > 10
    assert page.tables[0][1][:2] == [f"{evil} 1", f"{evil} (validation)"]
    assert any(text.startswith("<script>alert(1") and text.endswith("8.00") for text in page.svg_texts)


def test_a_torn_line_is_told(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [start(), train(1)], torn='{"kind":'))
    assert "pretrain: the last line of metrics.jsonl was cut off" in Page(render(arrange([run]))).text


def test_many_steps_and_sources_stay_a_small_page(tmp_path: Path) -> None:
    sources = [f"source{i}" for i in range(12)]
    steps = [train(i, loss_by_source={sources[i % 12]: 5.0}, tokens_by_source={sources[i % 12]: 10 * i}) for i in range(1, 6001)]
    losses = [evaluation(step, source, 6.0 - step / 6000) for step in (0, 6000) for source in sources]
    text = render(arrange([read_run(write_run(tmp_path / "run", [start(), *steps, *losses]))]))
    assert len(text) < 1_500_000
    assert [row[1] for row in Page(text).tables[0][1:]] == sources


def test_no_run_and_no_directory_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_reach_the_figures(tmp_path: Path) -> None:
    name = "\u65e5\u672c\u8a9e"
    page = _one_run(tmp_path, evaluation(0, name, 9.0), train(1), evaluation(1, name, 8.0))
    assert page.svg_texts.count(f"{name} 8.00") == 2


def test_a_run_that_shared_packs_has_a_section_about_it(tmp_path: Path) -> None:
    plans = [plan(step, packs_of_all_degrees(96, step), devices=96) for step in (1, 20)]
    steps = [shared(step, plan_policy="best_static" if step % 5 == 0 else "adaptive", plan_gap=0.01 * step) for step in range(1, 21)]
    records = [start(), *steps, *plans]
    run = read_run(write_run(tmp_path / "run", records, config={"planning": {"policy": "adaptive"}}))
    text = render(arrange([run]))
    page = Page(text)
    assert set(page.titles) >= SHARING_FIGURES
    assert "How ranks shared packs" in page.text
    for name, value in {
        "Planning policy": "adaptive",
        "Median gap to the bound": "10.5 %",
        "Median share of exchanges": "12.5 %",
        "Steps planned by fallback": "4 of 20",
        "Waited for plans": "20 ms",
    }.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert 'background: var(--grid)"></span>idle</span>' in text
    assert "degree 4: 75.0 %" in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    assert not {"script", "link", "img"} & set(page.tags)
    assert "#fe01" not in text


def test_where_every_rank_computes_whole_documents_nothing_is_said_of_plans(text: str, tmp_path: Path) -> None:
    alone = shared(1, plan_policy="data_parallel", tokens_by_degree={"1": 8192}, exchange_seconds=0.0)
    page = _one_run(tmp_path, alone, plan(1, [[0, 1, 1, 8192, 4, 0.0, 1.0]]))
    for words in (page.text, text):
        assert "shared packs" not in words and "Planning policy" not in words
    assert not SHARING_FIGURES & set(page.titles)


def test_a_run_resumed_from_an_old_version_shows_what_it_knows(tmp_path: Path) -> None:
    page = _one_run(tmp_path, train(1), train(2), shared(3, plan_policy="static"))
    assert set(page.titles) >= {"Tokens by degree", "Gap to the lower bound", "Time in exchanges"}
    assert "fallback" not in page.text
    assert not any("recorded step" in title for title in page.titles)
