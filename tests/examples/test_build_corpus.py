"""The two corpora of the examples: real, separate, and the same every time."""

import ast
import json
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

import pytest

from examples import build_corpus

LIBRARY = Path(sysconfig.get_path("stdlib"))
BUILD = Path(build_corpus.__file__)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Text by module path, by name of the file."""
    folder = tmp_path_factory.mktemp("corpora")
    done = subprocess.run([sys.executable, BUILD, "--output", folder], capture_output=True, text=True, check=True)
    read = {}
    for path, line in zip(sorted(folder.iterdir()), sorted(done.stdout.splitlines()), strict=True):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        read[path.name] = {record["path"]: record["text"] for record in records}
        lengths = [len(record["text"]) for record in records]
        assert line == f"{path}: {len(lengths):,} documents, {sum(lengths):,} characters, longest {max(lengths):,}"
    return read


def spans(texts: Iterable[str], size: int) -> set[str]:
    return {text[start : start + size] for text in texts for start in range(len(text) - size + 1)}


def longest_shared(texts: Iterable[str], foreign: set[str], size: int) -> str | None:
    """A span of ``size`` characters of the texts that is among the foreign ones."""
    for text in texts:
        for start in range(len(text) - size + 1):
            if text[start : start + size] in foreign:
                return text[start : start + size]
    return None


def test_prose_and_code_share_no_span_of_50_characters(corpora: dict[str, dict[str, str]]) -> None:
    prose = [*corpora["prose.train.jsonl"].values(), *corpora["prose.valid.jsonl"].values()]
    code = [*corpora["code.train.jsonl"].values(), *corpora["code.valid.jsonl"].values()]
    foreign = spans(prose, 50)
    assert longest_shared(code, foreign, 50) is None
    # Control: before lines were left out, there were such spans.
    source = (LIBRARY / "argparse.py").read_text("utf-8")
    assert longest_shared([source], foreign, 50) is not None


def test_modules_are_held_out_in_both_or_neither(corpora: dict[str, dict[str, str]]) -> None:
    train = corpora["prose.train.jsonl"].keys() | corpora["code.train.jsonl"].keys()
    valid = corpora["prose.valid.jsonl"].keys() | corpora["code.valid.jsonl"].keys()
    assert not train & valid
    assert 0.03 < len(valid) / len(train | valid) < 0.07
    assert len(corpora["prose.valid.jsonl"].keys() & corpora["code.valid.jsonl"].keys()) > 10


def test_corpora_are_large_and_code_is_longer(corpora: dict[str, dict[str, str]]) -> None:
    prose, code = corpora["prose.train.jsonl"].values(), corpora["code.train.jsonl"].values()
    assert sum(map(len, prose)) > 1e6 and sum(map(len, code)) > 4e6
    assert sum(map(len, code)) / len(code) > 2.5 * sum(map(len, prose)) / len(prose)


def test_tests_and_installed_packages_are_not_among_them(corpora: dict[str, dict[str, str]]) -> None:
    paths = {path for documents in corpora.values() for path in documents}
    assert "json/decoder.py" in paths
    assert not [path for path in paths if {"test", "tests", "idle_test", "site-packages"} & set(path.split("/"))]


def test_building_again_gives_the_same(corpora: dict[str, dict[str, str]]) -> None:
    prose, code = build_corpus.build(LIBRARY / "json")
    again_prose, again_code = build_corpus.build(LIBRARY / "json")
    assert (prose, code) == (again_prose, again_code)
    assert prose["decoder.py"] == (corpora["prose.train.jsonl"] | corpora["prose.valid.jsonl"])["json/decoder.py"]


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"part{number}.py": f'"""About part {number}."""\n\nraise SystemExit("imported", {number})\n' for number in range(40)}
    for name, source in {"__init__.py": "", **modules}.items():
        path = tmp_path / "somepackage" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    build_corpus.main(["--package", "somepackage", "--output", str(tmp_path / "out")])
    lines = [line for split in ("train", "valid") for line in (tmp_path / "out" / f"prose.{split}.jsonl").read_text("utf-8").splitlines()]
    found = {record["path"]: record["text"] for record in map(json.loads, lines)}
    assert found == {name: f"About part {number}." for number, name in enumerate(modules)}


def test_a_module_that_this_python_cannot_read_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.py").write_text('"""Good."""\nfirst = 1\n')
    (tmp_path / "new.py").write_text('"""Bad."""\nfirst ==== 1\n')
    assert build_corpus.build(tmp_path) == ({"old.py": "Good."}, {"old.py": "first = 1\n"})
    assert f"left out {tmp_path / 'new.py'}: this Python cannot read line 2: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing_of_that_name", "json.decoder", "ast", "../torch"])
def test_what_is_no_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_corpus.main(["--package", name, "--output", str(tmp_path / "out")])
    assert f"--package {name}: accepted is the name of an installed package" in capsys.readouterr().err


class WithoutStrings(ast.NodeTransformer):
    """Takes out statements that are only a string."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list) and statements:
                kept = [statement for statement in statements if not build_corpus.is_lone_string(statement)]
                setattr(node, block, kept or ([] if isinstance(node, ast.Module) else [ast.Pass()]))
        return node


@pytest.mark.parametrize("folder", ["json", "unittest", "importlib", "logging", "idlelib"])
def test_code_means_the_same_without_its_documentation(folder: str) -> None:
    for path in build_corpus.find_modules(LIBRARY / folder):
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
        code = build_corpus.bare_code(source, tree)
        assert ast.dump(ast.parse(code)) == ast.dump(WithoutStrings().visit(tree)), path
        assert not list(build_corpus.comments(code))
        lines = source.splitlines()
        whole, cut = {line.rstrip() for line in lines}, [line for line in lines if "#" in line]
        assert all(line in whole or line.strip() == "pass" or any(c.startswith(line) for c in cut) for line in code.splitlines()), path


def test_documentation_and_code_of_one_module() -> None:
    source = (
        '#!/usr/bin/python\n"""About é.\n\nMore."""\nimport os  # comment\n\n\n\n\n\nclass A:\n    "only"\n\n    # gone\n'
        "    def f(self):\n        '''Does f.'''\n        return '#'  # x\n\nx = 1\n'''lone'''; y = 2\n"
    )
    tree = ast.parse(source)
    assert build_corpus.documentation(tree) == "About é.\n\nMore.\n\nonly\n\nDoes f."
    assert build_corpus.bare_code(source, tree).split("\n") == [
        *("import os", "", "", "class A:", "", "", "    def f(self):", "", "        return '#'", "", "x = 1", "pass; y = 2", ""),
    ]


def test_lines_that_share_a_span_are_left_out() -> None:
    shared = "0123456789" * 5
    code = {"a": f"first\nx = '{shared}'\nlast\n", "b": f"y = '{shared[:49]}'\n", "c": f"one\n{shared[:30]}\n{shared[30:]}\ntwo\n"}
    kept = build_corpus.without_shared_lines(code, [f"prose {shared} prose", shared[:30] + "\n" + shared[30:]])
    assert kept == {"a": "first\nlast\n", "b": code["b"], "c": "one\ntwo\n"}


def test_lines_that_become_neighbours_are_compared_again() -> None:
    shared = "abcdefghijklmnopqrstuvwxyz" * 2
    left, right = "left-" * 5, "right-" * 5
    prose = [f"{left}\n{right}", shared]
    assert build_corpus.without_shared_lines({"a": f"keep\n{left}\n{shared}\n{right}\nkeep\n"}, prose) == {"a": "keep\nkeep\n"}
    assert build_corpus.without_shared_lines({"a": f"{left}\nother\n{right}\n"}, prose) == {"a": f"{left}\nother\n{right}\n"}
