"""Plans made ahead of time by a process beside the one that trains: ``python -m megatron_ext.planning.worker``.

Requests and answers are lines of JSON, answered in order.
"""

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

from megatron_ext.errors import ConfigError
from megatron_ext.planning.cost_file import cost_from_json, cost_to_json
from megatron_ext.planning.cost_model import CostModel
from megatron_ext.planning.policies import Planned, plan_and_compare
from megatron_ext.planning.splitting import in_documents, split_documents


@dataclass(frozen=True)
class PlanSettings:
    """What the plans of a run have in common."""

    devices: int
    policy: str
    degree: int | None = None
    largest_degree: int | None = None
    in_rounds: bool = False
    split_long: bool = False

    def longest_document(self, cost: CostModel) -> int:
        """Most tokens of a document that a block can hold."""
        largest = {"data_parallel": 1, "static": self.degree}.get(self.policy) or cost.degrees(self.devices, self.largest_degree)[-1]
        return cost.capacity(largest)

    def plan(self, lengths: Sequence[int], cost: CostModel) -> Planned:
        """Plan a step; raises ConfigError for documents that cannot be placed."""
        parts = split_documents(lengths, self.longest_document(cost)) if self.split_long else []
        planned = plan_and_compare(
            [len(part) for part in parts] or lengths,
            self.devices,
            cost,
            self.policy,
            degree=self.degree,
            largest_degree=self.largest_degree,
            in_rounds=self.in_rounds,
        )
        return replace(planned, plan=in_documents(planned.plan, parts)) if parts else planned


@dataclass(frozen=True)
class PlannedStep:
    """A plan as it travels, and what is known about it."""

    encoded: list[int]
    policy: str
    """The policy that made it: the best static one where that is as good."""
    seconds: float
    """Predicted, of the step."""
    bound: float
    """No plan takes less, by the same costs."""
    planning_seconds: float

    @classmethod
    def make(cls, settings: PlanSettings, lengths: Sequence[int], cost: CostModel) -> "PlannedStep":
        """Plan now."""
        begin = time.perf_counter()
        planned = settings.plan(lengths, cost)
        encoded = planned.plan.encode().tolist()
        return cls(encoded, planned.policy, planned.seconds, planned.bound, time.perf_counter() - begin)


class PlanWorker:
    """Plans steps in a process of its own, in the order in which they were asked for.

    Args:
        settings: of all plans.
        cost: what packs cost.
    """

    def __init__(self, settings: PlanSettings, cost: CostModel) -> None:
        command = [sys.executable, "-m", "megatron_ext.planning.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # In a session of its own: a signal to the run's processes lets training end its step, for which it may still need a plan.
        self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        self._answers: queue.Queue[str] = queue.Queue()
        # Answers are taken as they come: a process that cannot get rid of one would not go on.
        threading.Thread(target=_take_lines, args=(self._process.stdout, self._answers), daemon=True).start()
        self._say({**asdict(settings), "cost": cost_to_json(cost)})

    def ask(self, lengths: Sequence[int]) -> None:
        """Ask for the plan of a step with documents of these lengths."""
        self._say({"lengths": list(lengths)})

    def answer(self) -> PlannedStep:
        """The plan that was asked for first and has not been given yet; waits for it.

        Raises:
            ConfigError: the documents cannot be placed.
            RuntimeError: the process has ended.
        """
        line = self._answers.get()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return PlannedStep(**answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _say(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None, "opened as a pipe"
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> RuntimeError:
        assert self._process.stderr is not None, "opened as a pipe"
        said = self._process.stderr.read()
        self._process.wait()
        said = said.strip()[-2000:] or "no output"
        return RuntimeError(f"the process that plans ahead ended with code {self._process.returncode}: {said}")


def _take_lines(source: IO[str], lines: queue.Queue[str]) -> None:
    """Put every line of ``source`` into ``lines``, and an empty one at its end."""
    for line in source:
        lines.put(line)
    lines.put("")


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    waiting: queue.Queue[str] = queue.Queue()
    # Requests are taken as they come: the process that asks must not wait for the plan before.
    threading.Thread(target=_take_lines, args=(requests, waiting), daemon=True).start()
    first = json.loads(waiting.get())
    cost = cost_from_json(first.pop("cost"), "cost model of the run")
    settings = PlanSettings(**first)
    while line := waiting.get():
        try:
            answer = asdict(PlannedStep.make(settings, json.loads(line)["lengths"], cost))
        except ConfigError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
