"""The loop: documents, plan, step, metrics; now and then evaluation and a checkpoint."""

import base64
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.attempts import do_on_main
from megatron_ext.checkpoint.load import find_checkpoint, load_optimizer, verify
from megatron_ext.checkpoint.save import CheckpointWriter
from megatron_ext.config import changes, settings, total_steps
from megatron_ext.data.corpus import Piece
from megatron_ext.data.loss_weights import LossWeights, total_weight
from megatron_ext.errors import TrainingError
from megatron_ext.optim.schedules import learning_rate_factor
from megatron_ext.optim.state_change import StateChange, describe_changes
from megatron_ext.parallel.device import peak_memory_bytes, synchronize
from megatron_ext.parallel.grid import Grid
from megatron_ext.planning.worker import PlanSettings
from megatron_ext.train.beginning import Beginning, check_branch, from_nothing, introduce, versions
from megatron_ext.train.build import Setup, build_engine, build_model
from megatron_ext.train.cost_correction import CostCorrection
from megatron_ext.train.costs import cost_model
from megatron_ext.train.data_events import DataEvent, DataWatch
from megatron_ext.train.digests import build_digests
from megatron_ext.train.engine import StepResult
from megatron_ext.train.evaluation import evaluate
from megatron_ext.train.ledger import Ledger
from megatron_ext.train.loss_weighting import build_loss_weighting
from megatron_ext.train.needle_evaluation import NeedleEvaluation
from megatron_ext.train.objective import check_same_objective, objective_state
from megatron_ext.train.packs import PlannedPacks
from megatron_ext.train.precision import switch_target
from megatron_ext.train.probes import Reading, build_probes
from megatron_ext.train.profile import StepProfile
from megatron_ext.train.recorder import Recorder
from megatron_ext.train.run_lock import RunLock
from megatron_ext.train.saving import Saving
from megatron_ext.train.skip_events import rollback_event, skip_event
from megatron_ext.train.sources import check_same_data
from megatron_ext.train.step_guard import StepGuard
from megatron_ext.train.step_plans import StepPlan, StepPlanner
from megatron_ext.train.step_record import step_flops, step_record
from megatron_ext.train.stopping import StopRequest
from megatron_ext.train.stragglers import StragglerWatch
from megatron_ext.train.teacher import build_distillation

CHECKPOINTS = "checkpoints"
MOST_PACKS_WRITTEN = 4096
"""A plan of more packs makes no picture, and long lines."""


class Trainer:
    """One run on all ranks. Made after the process group; ``train`` runs it from wherever it stands to its end or until it is stopped.

    Nothing is written to the checkpoints of the run after ``lock``, if there is one, was lost.
    """

    def __init__(self, setup: Setup, grid: Grid, lock: RunLock | None = None) -> None:
        self.setup, self.grid, self.world = setup, grid, grid.world
        self.config = setup.config
        self.run_dir = Path(self.config.run_dir)
        self.total_steps = total_steps(self.config)
        self.step = 0
        self.tokens = 0
        self.tokens_by_source = dict.fromkeys((corpus.name for corpus in setup.mixture.corpora), 0)
        self.guard = StepGuard(self.config.train.skip)
        self.ledger = Ledger(self.run_dir, list(self.tokens_by_source), self.world.is_main, self.config.logging.ledger)
        self.stop = StopRequest(self.run_dir)
        check_same_data(setup.mixture, self.world)
        options = self.config.checkpoint
        checkpoint = find_checkpoint(self.run_dir / CHECKPOINTS, options.resume, options.branch_from, self.world.activity.move)
        self.model, self.chosen = build_model(setup, grid, resumes=checkpoint is not None)
        self.dtype = next(self.model.parameters()).dtype
        assert self.model.precision is not None, "build_model gives it"
        self.precision = self.model.precision
        self.distillation = build_distillation(self.config, self.model, list(self.tokens_by_source), grid)
        self.engine = build_engine(setup, self.model, grid, self.distillation)
        self.optimizer = self.engine.optimizer
        self.objective = objective_state(self.config, setup.loss_weights)
        self.loss_weighting = build_loss_weighting(self.config, list(self.tokens_by_source), self.engine)
        self.probes = build_probes(self.config, self.model, grid, self.optimizer)
        self.cost, why_cost = cost_model(setup, grid.shape, self.world.device, self.dtype)
        if self.config.planning.policy != "data_parallel":
            self.chosen["costs"] = why_cost
        self.correction = CostCorrection(self.cost)
        with self.world.activity.within("load"):
            self.beginning = self._resume(checkpoint)
        self.data_watch = DataWatch(setup.mixture, self.config.data.repeats_warned_at)
        self.planner = self._build_planner()
        self.needles = self._build_needles()
        self.stragglers = StragglerWatch(grid, self.config.logging)
        self.profile = StepProfile(self.config.logging.profile, self.run_dir, self.world)
        self.recorder = Recorder(self.config, self.step, self.world.is_main)
        self.console, self.metrics = self.recorder.console, self.recorder.metrics
        self.digests = build_digests(self.config, self.optimizer, setup.model, self.world, self.step)
        self.ledger.begin(self.step, self.guard.rollbacks, setup.mixture.state_dict())
        checkpoints = CheckpointWriter(
            self.run_dir / CHECKPOINTS,
            grid,
            setup.hf_config(self.dtype),
            setup.copy_tokenizer,
            self.config.checkpoint.keep_last,
            int(self.config.checkpoint.max_shard_gib * 2**30),
            self.config.checkpoint.keep_every,
            lock.confirm if lock else lambda: None,
            self._flush_records,
        )
        self.saving = Saving(checkpoints, self.config.checkpoint, self.metrics, self.console, self.beginning.checkpoint)

    def _build_planner(self) -> StepPlanner:
        options, data = self.config.planning, self.setup.mixture
        settings = PlanSettings(
            devices=self.grid.shape.dp,
            policy=options.policy,
            degree=options.degree,
            largest_degree=options.largest_degree,
            in_rounds=self.engine.in_rounds,
            split_long=options.split_long,
        )
        costs = self.correction.corrected(self.cost)
        return StepPlanner(settings, costs, self.grid, data, self.config.data.tokens_per_step, options.ahead)

    def _build_needles(self) -> NeedleEvaluation | None:
        options, haystack = self.config.evaluation.needle, self.setup.haystack
        return NeedleEvaluation(options, haystack, self.model, self.engine, self.planner) if options and haystack else None

    def train(self) -> None:
        """Run to the last step, or to the end of the step in which a stop was asked for; then save."""
        try:
            self._train()
        except TrainingError:
            # All ranks raise it after the same step, and what was saved before that is worth having.
            self.saving.end()
            # No rank ends, and lets others be killed, before rank 0 has told it.
            self.world.barrier()
            raise
        finally:
            self.planner.close()
        self.world.activity.begin("end")
        self._flush_records()
        self.engine.close()

    def _train(self) -> None:
        introduce(self.recorder, self.beginning, self.setup, self.grid, self.dtype, self.chosen, self.step, self.tokens)
        saved = self.step
        if self.step == 0 or self.beginning.branched:
            self._evaluate()
            self._find_needles()
        self.console.start_clock()
        while self.step < self.total_steps:
            stopping = self._train_step()
            self.saving.look()
            checkpoint = self.saving.newest() if self.guard.goes_back else None
            self.guard.check(checkpoint is not None)
            if checkpoint is not None:
                self._go_back(checkpoint)
            else:
                saved = self._end_step(stopping) or saved
            if stopping:
                self.metrics.write("event", event="stop", step=self.step, tokens=self.tokens)
                self.console.say(f"stopped after step {self.step} on request; start the same command again to continue")
                break
        else:
            for event in self.data_watch.unreached():
                self._tell(event)
            self.recorder.forgotten([name for name, tokens in self.tokens_by_source.items() if tokens])
            self.metrics.write("event", event="finish", step=self.step, tokens=self.tokens)
            # A run without a step to train stays with the checkpoint, which may be another run's, that it was to go on from.
            place = self.saving.newest() or self.beginning.checkpoint
            assert place is not None, "a run has a step"
            self.console.say(f"finished: step {saved} is in {place.parent}")

    def _end_step(self, stopping: bool) -> int | None:
        """Evaluate and save where it is due; returns the step if it was saved."""
        if self._due(self.config.evaluation.every) or self.step == self.total_steps:
            self._evaluate()
        if self._needles_due():
            self._find_needles()
        if not (stopping or self._due(self.config.checkpoint.every) or self.step == self.total_steps):
            return None
        self._save(last=stopping or self.step == self.total_steps)
        return self.step

    def _train_step(self) -> bool:
        """One optimizer step; returns whether a rank was asked to stop."""
        begin = time.perf_counter()
        activity = self.world.activity
        activity.begin("data", step=self.step + 1)
        self.profile.begin_step(self.step + 1)
        pieces = self.setup.mixture.take(self.config.data.tokens_per_step)
        activity.begin("plan")
        step_plan = self.planner.next_step(pieces, self.setup.mixture.corpora)
        self.step += 1
        self.guard.begin_step(self.step, self.setup.mixture.stage.begin)
        factor = learning_rate_factor(self.config.schedule, self.step, self.total_steps)
        self.optimizer.set_learning_rate_factor(factor)
        asked = torch.tensor([float(self.stop.reason is not None)], dtype=torch.float64)
        mine = self.engine.packs_of(step_plan.plan)
        packs = PlannedPacks(mine, pieces, self.setup.mixture.corpora, self.setup.model.vocab_size, self.grid.dp.rank)
        if self.precision.begin_step(self.step, self.tokens):
            self._say_switched()
        packs, loss_weight = self._weighted(packs)
        if self.digests is not None:
            self.digests.begin_step(self.step)
        with self._watched() as reading:
            result = self.engine.step(packs, loss_weight, asked, self.guard.judge)
        activity.begin("record")
        self.precision.end_step()
        if self.digests is not None:
            self.digests.end_step(self.step, pieces, result.loss, factor * self.config.optimizer.lr)
        if self._due(self.config.train.check_replicas_every):
            self.optimizer.check_replicas()
        synchronize(self.world.device)
        if self.config.planning.correct:
            self.correction.add(step_plan.plan, self.grid.dp.rank, self.planner.cost, self.engine.pack_seconds)
        self._check_rules(result)
        slow, stragglers = self.stragglers.look(result.work_seconds)
        self._record(pieces, step_plan, result, factor, time.perf_counter() - begin, slow)
        for straggler in stragglers:
            self._tell(DataEvent("straggler", asdict(straggler), straggler.message))
        self.ledger.write(self.step, pieces, skipped=result.skipped)
        if self.guard.bad is not None:
            self._tell(skip_event(self.guard.bad, self.ledger, pieces))
        for event in self.data_watch.look():
            self._tell(event)
        if reading is not None:
            self.recorder.probe(self.step, self.tokens, reading)
        stopping = bool(result.flags[0] > 0)
        if trace := self.profile.end_step(self.step, stopping):
            self.console.say(f"step {self.step}: trace in {trace}")
        return stopping

    def _go_back(self, checkpoint: Path) -> None:
        """Become the run that resumes from ``checkpoint`` and passes over the documents read since, and let the checkpoint say so."""
        last, tokens, rollbacks, causes = self.step, self.tokens, self.guard.rollbacks, self.guard.causes()
        with self.world.activity.within("load"):
            self._restore(checkpoint, verify(checkpoint, self.world))
        mixture = self.setup.mixture
        self.data_watch = DataWatch(mixture, self.config.data.repeats_warned_at)
        do_on_main(self.world, lambda: self.metrics.go_back(self.step), "go back")
        if self.digests is not None:
            self.digests.go_back(self.step)
        do_on_main(self.world, lambda: self.ledger.begin(self.step, rollbacks, mixture.state_dict()), "go back")
        for step in range(self.step + 1, last + 1):
            self.ledger.pass_over(self.step, rollbacks, step, mixture.take(self.config.data.tokens_per_step))
        self.guard.went_back(rollbacks + 1)
        self._tell(rollback_event(rollbacks, (self.step, last), (self.tokens, tokens), causes))
        for event in self.data_watch.look():
            self._tell(event)
        self.saving.amend(checkpoint, {"data": mixture.state_dict(), "guard": self.guard.state()})
        self.planner.restart(mixture, self.correction.corrected(self.cost))
        self.console.start_clock()

    def _tell(self, event: DataEvent) -> None:
        self.recorder.event(self.step, self.tokens, event)

    def _weighted(self, packs: PlannedPacks) -> tuple[PlannedPacks, float]:
        """The packs with the weights of their losses, and the sum of those of the whole step."""
        weights: LossWeights | None = self.setup.loss_weights
        if self.loss_weighting is not None:
            weights = self.loss_weighting.weights(self.step, packs, weights)
        loss_weight = total_weight(packs.pieces, weights)
        if self.distillation is not None:
            self.distillation.begin_step(self.step, loss_weight)
        return replace(packs, weights=weights), loss_weight

    def _watched(self) -> AbstractContextManager[Reading | None]:
        """Around the step, which is looked into if it is its turn."""
        due = self.probes is not None and (self.step == 1 or self._due(self.config.logging.probes_every))
        return self.probes.watch() if due else nullcontext()

    def _record(
        self, pieces: list[Piece], step_plan: StepPlan, result: StepResult, factor: float, seconds: float, slow: dict[str, Any]
    ) -> None:
        """Count the documents of the step and write what it came to."""
        names, step_tokens = list(self.tokens_by_source), sum(map(len, pieces))
        self.tokens += step_tokens
        for piece in pieces:
            self.tokens_by_source[names[piece.source]] += len(piece)
        flops = step_flops(self.setup.model, pieces)
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "tokens_by_source": dict(self.tokens_by_source),
            "lr": factor * self.config.optimizer.lr,
            **step_record(pieces, names, step_plan, result, seconds, flops, self.setup.tokens_per_pack),
            **self._rule_records(factor, result),
            "memory_gib": peak_memory_bytes(self.world.device) / 2**30,
            **slow,
            **(step_plan.record() if self.world.is_main else {}),
            **self.guard.records(),
            "epochs": self.setup.mixture.epochs(),
        }
        shown = self._due(self.config.logging.every) or self.step in (1, self.total_steps)
        self.recorder.step(record, step_tokens, flops, partial(self._picture, step_plan) if shown else None)

    def _picture(self, step_plan: StepPlan) -> dict[str, Any]:
        return step_plan.picture(self.planner.cost) if len(step_plan.plan.packs) <= MOST_PACKS_WRITTEN else {}

    def _say_switched(self) -> None:
        self.metrics.write("event", event="precision_switch", step=self.step, tokens=self.tokens)
        self.console.say(f"step {self.step} begins after {self.tokens:,} tokens: from here on {switch_target(self.config)}")

    def _check_rules(self, result: StepResult) -> None:
        """Nobody should believe to train with Muon while nothing is orthogonalized."""
        rests = result.skipped or self.config.optimizer.half_fine_tuning is not None
        if {"muon", "normuon"} & self.config.optimizer.rules and not rests and not result.orthogonalizations:
            raise AssertionError(f"step {self.step}: a rule that orthogonalizes has parameters, but no matrix was orthogonalized")

    def _rule_records(self, factor: float, result: StepResult) -> dict[str, Any]:
        """Of each rule beside adamw: its learning rate; and how many matrices were orthogonalized."""
        rates = {name: factor * self.config.optimizer.base_lr(name) for name in sorted(self.config.optimizer.rules)}
        rules = {"lr_by_rule": rates, "orthogonalizations": result.orthogonalizations} if rates else {}
        methods = [method for method in (self.distillation, self.loss_weighting) if method is not None]
        return rules | self.optimizer.records() | {key: value for method in methods for key, value in method.records().items()}

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _evaluate(self) -> None:
        self.world.activity.begin("evaluate", step=self.step)
        buckets = self.config.evaluation.position_buckets
        with self.model.seeing(self.config.model.evaluation_window):
            results = evaluate(self.engine, self.setup.validation, self.planner, self.setup.model.vocab_size, buckets)
        self.recorder.evaluation(self.step, self.tokens, results)

    def _needles_due(self) -> bool:
        options = self.config.evaluation
        return self.step == self.total_steps or self._due((options.needle and options.needle.every) or options.every)

    def _find_needles(self) -> None:
        if self.needles is None:
            return
        self.world.activity.begin("evaluate", step=self.step)
        with self.model.seeing(self.config.model.evaluation_window):
            result = self.needles.run()
        self.recorder.needles(self.step, self.tokens, result)

    def _save(self, last: bool) -> None:
        self.world.activity.begin("save", step=self.step)
        if self.config.planning.correct:
            self._correct_costs()
        self.saving.save(self.step, self.engine.weight, self.optimizer, self._state(), last)
        self.console.start_clock()

    def _flush_records(self) -> None:
        """Put on disk what tells of the run up to here, before a checkpoint says that it was done. Raises StorageError."""
        self.ledger.flush()
        self.metrics.flush()
        if self.digests is not None:
            self.digests.flush()

    def _correct_costs(self) -> None:
        """Fit the cost model to the steps since the last checkpoint."""
        self.correction.fit(self.world)
        compute, exchange = self.correction.compute, self.correction.exchange
        self.planner.restart(self.setup.mixture, self.correction.corrected(self.cost))
        self.metrics.write("event", event="cost_correction", step=self.step, compute=compute, exchange=exchange)
        self.console.say(f"costs corrected by the steps since the last checkpoint: compute x {compute:.3f}, exchanges x {exchange:.3f}")

    def _state(self) -> dict[str, Any]:
        """What resuming needs beside the optimizer."""
        return {
            "format": 1,
            "tokens": self.tokens,
            "tokens_by_source": self.tokens_by_source,
            "guard": self.guard.state(),
            "updates": self.optimizer.updates,
            "total_steps": self.total_steps,
            "settings": settings(self.config),
            "data": self.setup.mixture.state_dict(),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "grid": asdict(self.grid.shape),
            "cost_correction": self.correction.state(),
            "routes": self.setup.routes,
            "precision": self.precision.saved(),
            "objective": self.objective,
            "versions": versions(),
        }

    def _resume(self, path: Path | None) -> Beginning:
        """Continue from the checkpoint ``path``, if there is one."""
        options = self.config.checkpoint
        if path is None:
            return from_nothing(self.run_dir) if self.world.is_main else Beginning()
        state = verify(path, self.world)
        branched = options.branch_from is not None and path == Path(options.branch_from)
        if branched:
            check_branch(self.config, path, state["step"])
        check_same_objective(state.get("objective"), self.objective, options.allow_changed_data)
        overrides = changes(state.get("settings", {}), settings(self.config))
        return Beginning(path, branched, tuple(overrides), tuple(describe_changes(self._restore(path, state))))

    def _restore(self, path: Path, state: dict[str, Any]) -> list[StateChange]:
        """Stand where the checkpoint ``path`` with this state was saved; returns what of the optimizer could not be kept."""
        self.setup.mixture.load_state_dict(state["data"], self.config.checkpoint.allow_changed_data)
        changes = load_optimizer(path, self.optimizer, self.world)
        self.step, self.tokens = state["step"], state["tokens"]
        self.tokens_by_source = {name: state["tokens_by_source"].get(name, 0) for name in self.tokens_by_source}
        self.optimizer.updates = state["updates"]
        self.guard.load(state["guard"] if "guard" in state else self.guard.state() | {"skipped": state["skipped_steps"]})
        self.correction = CostCorrection(self.cost)
        self.correction.load(state.get("cost_correction"))
        self.precision.load(state.get("precision"))
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))
        return changes
