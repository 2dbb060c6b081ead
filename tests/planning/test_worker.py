import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning import CostModel, Plan
from megatron_ext.planning.cost_file import cost_to_json
from megatron_ext.planning.cost_model import AttentionShape
from megatron_ext.planning.worker import PlannedStep, PlanSettings, PlanWorker, serve

SETTINGS = PlanSettings(4, "best_static")
COST = CostModel(100, per_token_squared=0.01, attention=AttentionShape(query_heads=4))
STEPS = [[30, 70, 150, 20], [5], [200, 200, 3], []]


@pytest.fixture
def worker() -> Iterator[PlanWorker]:
    worker = PlanWorker(SETTINGS, COST)
    yield worker
    worker.close()


def test_plans_are_those_made_here_in_the_order_asked(worker: PlanWorker) -> None:
    for lengths in STEPS:
        worker.ask(lengths)
    for lengths in STEPS:
        seen, expected = worker.answer(), PlannedStep.make(SETTINGS, lengths, COST)
        assert replace(seen, planning_seconds=0.0) == replace(expected, planning_seconds=0.0)
        Plan.decode(np.array(seen.encoded, dtype=np.int32)).validate(lengths, COST.tokens_per_rank)


def test_many_requests_before_the_first_answer_block_nobody(worker: PlanWorker) -> None:
    lengths = [1 + number % 90 for number in range(20_000)]
    for _ in range(4):
        worker.ask(lengths)
    assert len({tuple(worker.answer().encoded) for _ in range(4)}) == 1


def test_a_document_that_fits_nowhere_is_an_error_here_and_the_next_step_is_planned(worker: PlanWorker) -> None:
    worker.ask([401])
    worker.ask([400])
    with pytest.raises(ConfigError, match="document 0 has 401 tokens"):
        worker.answer()
    assert worker.answer().encoded


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_run_does_not_end_the_planner(kind: signal.Signals) -> None:
    program = (
        "import os, signal; from megatron_ext.planning import CostModel\n"
        "from megatron_ext.planning.worker import PlanSettings, PlanWorker\n"
        f"signal.signal({int(kind)}, lambda *_: None)\n"
        "worker = PlanWorker(PlanSettings(1, 'static', 1), CostModel(9)); worker.ask([5]); worker.answer()\n"
        f"os.killpg(0, {int(kind)}); worker.ask([7]); print(len(worker.answer().encoded)); worker.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], start_new_session=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and int(done.stdout) == 11, done.stderr


def test_a_process_that_died_is_named_with_what_it_said(worker: PlanWorker) -> None:
    worker._process.kill()
    with pytest.raises(RuntimeError, match="plans ahead ended with code -9: no output"):
        worker.answer()


def test_serving_needs_no_process() -> None:
    first = {"devices": 2, "policy": "data_parallel", "cost": cost_to_json(COST)}
    answers = io.StringIO()
    serve(io.StringIO("\n".join(map(json.dumps, [first, {"lengths": [7]}, {"lengths": [101]}]))), answers)
    good, bad = map(json.loads, answers.getvalue().splitlines())
    assert good["policy"] == "data_parallel" and "document 0 has 101 tokens" in bad["error"]


def test_split_documents_fit() -> None:
    settings = PlanSettings(2, "adaptive", split_long=True)
    planned = settings.plan([450, 3], COST)
    planned.plan.validate([450, 3], COST.tokens_per_rank)
    assert settings.longest_document(COST) == 200
    with pytest.raises(ConfigError, match="document 0 has 450 tokens"):
        PlanSettings(2, "adaptive").plan([450, 3], COST)
