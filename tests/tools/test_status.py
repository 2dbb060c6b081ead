import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.report.fake_runs import start, train, write_run
from tests.tools.loading import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("status")


def with_event(folder: Path, line: str) -> Path:
    directory = write_run(folder / "run", [start(), *(train(step) for step in range(1, 31))])
    (directory / "events.jsonl").write_text(line + "\n")
    return directory


@pytest.mark.parametrize(
    ("line", "code", "state"),
    [
        ('{"kind": "event", "event": "finish", "step": 30, "time": 1.7e9}', 0, "finished"),
        ('{"kind": "event", "event": "stop", "step": 30, "time": 1.7e9}', 11, "stopped"),
        ('{"kind": "event", "event": "failure", "step": 30, "time": 1.7e9, "rank": 3, "what": "[red]oh[/red]"}', 12, "failed"),
        ('{"kind": "event", "event": "override", "step": 0, "time": 1.7e9}', 13, "stale"),
        ('{"kind": "event", "event": "override", "step": 0, "time": 9.9e9}', 10, "running"),
    ],
)
def test_the_exit_status_says_the_state(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, state: str
) -> None:
    directory = with_event(tmp_path, line)
    assert tool.main([str(directory)]) == code
    text = capsys.readouterr().out
    assert state in text and "30 of 100 (30 %)" in text and ("[red]oh[/red]" in text or state != "failed")
    assert tool.main([str(directory), "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert (answer["state"], answer["step"], answer["total_steps"], answer["loss"]) == (state, 30, 100, 5.0)
    assert answer["checkpoint_time"] is None and answer["events"][0]["step"] in (0, 30)


def test_following_ends_with_the_run(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = with_event(tmp_path, '{"kind": "event", "event": "override", "step": 0, "time": 9.9e9}')
    looks = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            with open(directory / "events.jsonl", "a") as file:
                file.write('{"kind": "event", "event": "stop", "step": 30, "time": 1.7e9}\n')

    monkeypatch.setattr(tool.time, "sleep", wait)
    assert tool.main([str(directory), "--follow", "--interval", "0.5"]) == 11
    assert looks == [0.5] * 3 and "stopped: on request after step 30" in capsys.readouterr().out


def test_bad_directories_get_one_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path / "absent")]) == 1
    assert tool.main([str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith(f"error: {tmp_path}") for line in errors)
