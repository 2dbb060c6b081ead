"""First differences of digests that are written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import DataError
from megatron_ext.report.digests import DIGESTS_FILE, RunDigests, cause, first_difference, read_digests

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def tensors(**changed: list[Any]) -> dict[str, list[Any]]:
    return {name: changed.get(f"t{number}", ["aa", 2.0]) for number, name in enumerate(NAMES)}


def write(folder: Path, *records: dict[str, Any]) -> RunDigests:
    folder.mkdir()
    (folder / DIGESTS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return read_digests(folder)


def step(number: int, **changes: Any) -> dict[str, Any]:
    same = {"documents": "dd", "loss": 3.0, "lr": 0.1, "gradients": tensors(), "parameters": tensors()}
    return {"kind": "digests", "step": number, **same, **changes}


def begin(number: int, **changed: list[Any]) -> dict[str, Any]:
    return {"kind": "begin", "step": number, "parameters": tensors(**changed)}


CASES = [
    ([begin(0, t1=["bb", 2.5])], "begin", "initial weights"),
    ([begin(0), step(1, documents="ee", loss=9.0)], "documents", "order of them"),
    ([begin(0), step(1, loss=3.3, gradients=tensors(t0=["bb", 9.0]))], "loss", "forward pass computes otherwise"),
    ([begin(0), step(1, loss=3.0000001)], "loss", "only last bits"),
    ([begin(0), step(1, gradients=tensors(t1=["bb", 3.0], t2=["cc", 3.0]), lr=0.2)], "gradients", "one kind of layer"),
    ([begin(0), step(1, gradients=tensors(t1=["bb", 2.000001]))], "gradients", "only last bits"),
    ([begin(0), step(1, lr=0.2, parameters=tensors(t0=["bb", 2.1]))], "learning rate", "optimizer.lr"),
    ([begin(0), step(1, parameters=tensors(t1=["bb", 2.1], t2=["bb", 2.1]))], "parameters", "updates are not"),
    ([begin(0), step(1, parameters=tensors(t2=["bb", 2.0]))], "parameters", "bits were changed"),
    ([begin(0), step(1), begin(1, t2=["bb", 2.0]), step(2, documents="ee")], "begin", "not restored"),
]


@pytest.mark.parametrize(("records", "what", "why"), CASES, ids=[f"{n}-{what}" for n, (_, what, _) in enumerate(CASES)])
def test_the_first_difference_and_its_cause(tmp_path: Path, records: list[dict[str, Any]], what: str, why: str) -> None:
    straight = write(tmp_path / "one", begin(0), step(1), step(2))
    later = [step(2, loss=7.0)] if all(record["step"] < 2 for record in records) else []
    other = write(tmp_path / "other", *records, *later, *([] if any(r["kind"] == "digests" for r in records) else [step(1)]))
    for runs in ((straight, other), (other, straight)):
        found = first_difference(*runs)
        assert found is not None and found.what == what
        assert why in cause(found, *runs, [])
    if found.tensors:
        assert found.tensors[0] in str(found) and found.tensors == tuple(name for name in NAMES if name in found.tensors)


def test_equal_runs_have_none_and_a_grid_is_named(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, begin(0), step(1), step(2)) for name in ("one", "other"))
    assert first_difference(one, other) is None
    third = write(tmp_path / "third", begin(0), step(1, loss=3.0000001))
    found = first_difference(one, third)
    assert found is not None and "parallel.tp" in cause(found, one, third, ["parallel.tp", "seed"])


def test_nan_is_equal_to_itself(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, step(1, loss=float("nan"))) for name in ("one", "other"))
    assert first_difference(one, other) is None


def test_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    one, later = write(tmp_path / "one", step(1)), write(tmp_path / "later", step(2))
    with pytest.raises(DataError, match="no step in common"):
        first_difference(one, later)
    with pytest.raises(DataError, match="logging.digests_every"):
        read_digests(tmp_path)
    for wrong in ({"kind": "x"}, step(-1), step(1, loss="3"), step(1, gradients={"a": 1}), step(1, documents=3), []):
        (tmp_path / DIGESTS_FILE).write_text(json.dumps(step(1)) + "\n" + json.dumps(wrong) + "\n", "utf-8")
        with pytest.raises(DataError, match=f"{DIGESTS_FILE}:2: no digests"):
            read_digests(tmp_path)
