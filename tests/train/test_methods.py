"""Methods that change updates: on every grid those of a loop in plain torch, in whole runs with exact resume."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_ext.config.deepspeed import deepspeed_config
from megatron_ext.config.load import load_config
from megatron_ext.model.gpt import GPT
from megatron_ext.model.placements import placements
from megatron_ext.optim.adamw import AdamW, decay_groups
from megatron_ext.optim.half_fine_tuning import HalfFineTuning
from megatron_ext.optim.method_options import HalfFineTuningOptions, MagnitudeGateOptions, MetaExperienceReplayOptions
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.sharded import ShardedOptimizer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.placement import whole_box
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.train.engine import owner_engine
from megatron_ext.train.methods import update_extensions
from tests.distributed import RunRanks
from tests.grids import everywhere
from tests.train.test_grids import CLIP, RULE, Case, largest_error, loss_tokens, packs
from tests.train.test_trainer import CHECKPOINTS, copy_of, drop_after, same_tensors
from tests.train.tiny_run import losses, master_weights, train, write_run

SEED, STEPS = 5, 5
METHODS = {
    "half_fine_tuning": HalfFineTuningOptions(stage_steps=2),
    "magnitude_gate": MagnitudeGateOptions(threshold=0.6),
    "meta_experience_replay": MetaExperienceReplayOptions(every=2, factor=0.3),
}
MOMENTS = ("exp_avg", "exp_avg_sq")
Values = dict[str, Tensor]


def train_on(world: World, config: str, case: Case, method: str) -> dict[str, Any]:
    """Some steps with a method: losses, and the values and moments of what this rank owns."""
    grid = Grid(world, GridShape(case.pp, case.ranks // case.pp // case.tp, case.tp), kv_copies=max(1, case.tp // case.kv_heads))
    model = GPT(case.model, "sdpa", case.recompute, TensorParallel(grid.tp, case.shard_tokens), stages(case.layers)[grid.stage])
    model.reset_parameters(seed=3)
    model.to(torch.float64)
    where = placements(model, grid, case.tied)
    rules = everywhere(lambda owned: AdamW(decay_groups(owned, 0.1), **RULE), where)
    extensions = update_extensions(model, OptimizerOptions(**{method: METHODS[method]}), grid, SEED)
    optimizer = ShardedOptimizer(dict(model.named_parameters()), where, rules, grid, CLIP, extensions=extensions)
    settings = deepspeed_config(load_config(config, [f"parallel.pp={case.pp}"]), grid.shape.dp)
    engine = owner_engine(model, optimizer, grid, settings, 1)
    mine = packs()[grid.dp.rank :: grid.shape.dp]
    results = [engine.step(mine, loss_tokens(), torch.zeros(0, dtype=torch.float64)) for _ in range(STEPS)]
    optimizer.check_replicas()
    engine.close()
    owned = [(part.name, part.box, state) for part, state in optimizer.owned_state()]
    tensors = {kind: [(name, box, state[kind]) for name, box, state in owned if kind in state] for kind in ("master", *MOMENTS)}
    return {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], **tensors}


def linears(model: GPT) -> dict[str, nn.Linear]:
    """Of all blocks, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj") and isinstance(module, nn.Linear)}


@contextmanager
def magnitudes_of(model: GPT) -> Iterator[Values]:
    """Mean over tokens of |h| over the sum of the token's |h|, of every linear's output h."""
    shares: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    hooks = [
        linear.register_forward_hook(lambda m, a, h, to=shares[name]: to.append(h.detach().abs() / h.detach().abs().sum(1, keepdim=True)))
        for name, linear in linears(model).items()
    ]
    means: Values = {}
    yield means
    means |= {name: torch.cat(each).mean(0) for name, each in shares.items()}
    for hook in hooks:
        hook.remove()


def smallest(values: Tensor, share: float) -> Tensor:
    """Bool: the smallest ``share`` of all values, rounded down."""
    count = int(share * len(values))
    return values <= values.sort().values[count - 1] if count else torch.zeros_like(values, dtype=torch.bool)


def train_alone(case: Case, method: str) -> dict[str, Any]:
    """The same steps in one process by a loop in plain torch."""
    model = GPT(case.model, "sdpa")
    model.reset_parameters(seed=3)
    model.to(torch.float64)
    parameters = dict(model.named_parameters())
    rule = AdamW(decay_groups(parameters.items(), 0.1), **RULE)
    half = HalfFineTuning(parameters, SEED, METHODS["half_fine_tuning"].stage_steps)
    anchor = {name: value.detach().clone() for name, value in parameters.items()}
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(1, STEPS + 1):
        rule.zero_grad()
        with magnitudes_of(model) as magnitudes:
            loss = sum(model(*pack.model_inputs)[0] for pack in packs()) / loss_tokens()
        loss.backward()
        frozen: dict[str, Tensor] = {}
        if method == "half_fine_tuning":
            half.prepare(step)
            for name, parameter in parameters.items():
                if not half.updated(OwnedBox(name, whole_box(parameter.shape), 0)):
                    parameter.grad = None
        if method == "magnitude_gate":
            rows = {name: smallest(values, METHODS[method].threshold) for name, values in magnitudes.items()}
            frozen = {name: rows[name.rpartition(".")[0]] for name in parameters if name.rpartition(".")[0] in rows}
        for name, mask in frozen.items():
            parameters[name].grad[mask] = 0.0
        seen["losses"].append(float(loss.detach()))
        seen["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        kept = {name: [t.detach()[mask] for t in tensors_of(rule, parameters[name])] for name, mask in frozen.items()}
        rule.step()
        with torch.no_grad():
            for name, mask in frozen.items():
                for tensor, values in zip(tensors_of(rule, parameters[name]), kept[name] or [0.0], strict=False):
                    tensor[mask] = values
            if method == "meta_experience_replay" and step % METHODS[method].every == 0:
                for name, parameter in parameters.items():
                    parameter.copy_(anchor[name] + METHODS[method].factor * (parameter - anchor[name]))
                    anchor[name] = parameter.clone()
    state = {kind: {n: rule.state[p][kind] for n, p in parameters.items() if kind in rule.state[p]} for kind in MOMENTS}
    return seen | {"master": {name: parameter.detach() for name, parameter in parameters.items()}, **state}


def tensors_of(rule: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The parameter and its moments."""
    return [parameter, *(rule.state[parameter][kind] for kind in MOMENTS if kind in rule.state[parameter])]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("methods")))


CASES = [
    Case(ranks=2, tied=True),
    Case(tp=2, ranks=2, shard_tokens=True, recompute="selective"),
    Case(pp=2, ranks=2, layers=(2, 1), tied=True, recompute="full"),
    Case(tp=4, ranks=4, kv_heads=1),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_methods_equal_a_plain_loop(run_ranks: RunRanks, config: str, case: Case, method: str) -> None:
    expected = train_alone(case, method)
    for result in run_ranks(case.ranks, train_on, config, case, method):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-10, abs=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-10, abs=0)
        assert {name for name, *_ in result[MOMENTS[0]]} <= expected[MOMENTS[0]].keys(), "what never was updated has no moments"
        for kind in ("master", *MOMENTS):
            assert largest_error(result[kind], expected[kind]) < 1e-10


def test_the_methods_differ_from_each_other_and_from_none() -> None:
    losses = [train_alone(Case(), method)["losses"][-1] for method in (*METHODS, "none")]
    assert min(abs(a / b - 1) for a in losses for b in losses if a is not b) > 1e-6


RUN = {"train__dtype": "float64", "checkpoint__keep_last": 9, "checkpoint__every": 2}
HALF = {"optimizer__half_fine_tuning": {"stage_steps": 3}}
GATED = {**HALF, "optimizer__magnitude_gate": {"threshold": 0.5}}
REPLAYED = {**HALF, "optimizer__meta_experience_replay": {"every": 3, "factor": 0.4}}


@pytest.fixture(scope="module")
def gated(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that freezes in both ways."""
    folder = tmp_path_factory.mktemp("gated")
    run_ranks(1, train, write_run(folder, **RUN, **GATED))
    return folder


@pytest.fixture(scope="module")
def replayed(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that freezes and goes back, with all its checkpoints (2, 4, 6, 8)."""
    folder = tmp_path_factory.mktemp("replayed")
    run_ranks(1, train, write_run(folder, **RUN, **REPLAYED))
    return folder


@pytest.mark.parametrize(
    "ranks, changes", [(2, {"train__mlp_tile_tokens": 5}), (4, {"parallel__tp": 2}), (4, {"parallel__pp": 2})], ids=["dp2", "tp2", "pp2"]
)
def test_shared_packs_change_nothing(run_ranks: RunRanks, tmp_path: Path, gated: Path, ranks: int, changes: dict[str, object]) -> None:
    shared = {"planning__policy": "adaptive", "planning__tokens_per_pack": 16, "checkpoint__every": None}
    run_ranks(ranks, train, write_run(tmp_path, **RUN | GATED | shared | changes))
    assert losses(tmp_path / "run") == pytest.approx(losses(gated / "run"), rel=1e-10, abs=0)


def test_resume_is_bit_exact(run_ranks: RunRanks, tmp_path: Path, replayed: Path) -> None:
    config = copy_of(replayed, tmp_path, until=4)
    write_run(tmp_path, **RUN, **REPLAYED)
    run_ranks(1, train, config)
    assert losses(tmp_path / "run") == losses(replayed / "run")
    whole, parted = (master_weights(folder / CHECKPOINTS / "step_00000008") for folder in (replayed, tmp_path))
    assert same_tensors(parted, whole) and any(name.endswith("|reptile_anchor") for name in whole)


def test_anchors_are_read_on_another_grid(run_ranks: RunRanks, tmp_path: Path, replayed: Path) -> None:
    shutil.copytree(replayed / "run", tmp_path / "run")
    drop_after(tmp_path, 4)
    run_ranks(4, train, write_run(tmp_path, **RUN | REPLAYED | {"parallel__tp": 2}))
    assert losses(tmp_path / "run") == pytest.approx(losses(replayed / "run"), rel=1e-10, abs=0)


def test_frozen_is_exactly_frozen(run_ranks: RunRanks, tmp_path: Path) -> None:
    half = {"optimizer__half_fine_tuning": {"stage_steps": 4}, "checkpoint__every": 1, "train__dtype": "float32"}
    run_ranks(2, train, write_run(tmp_path, checkpoint__keep_last=9, optimizer__weight_decay=0.5, **half))
    at = {step: master_weights(tmp_path / CHECKPOINTS / f"step_{step:08d}") for step in (1, 4, 5, 8)}
    kept = [{key for key, value in at[b].items() if key in at[a] and torch.equal(value, at[a][key])} for a, b in ((1, 4), (5, 8))]
    of_blocks = {key for key in at[8] if key.startswith("model.layers.")}
    for frozen in kept:
        masters = {key for key in frozen if key.endswith("|master")}
        assert 0.4 < len(masters) / sum(key.endswith("|master") for key in of_blocks) < 0.6
        assert frozen - masters <= {key.replace("|master", f"|{moment}") for key in masters for moment in MOMENTS}
    assert kept[0] != kept[1] and all(key in of_blocks for frozen in kept for key in frozen), "the rest is always trained"
    moved = {key for key in kept[1] if not key.endswith("|master")}
    assert moved, "moments of the first stage rest in the second"


@pytest.mark.parametrize(
    "neutral",
    [{"optimizer__magnitude_gate": {"threshold": 0.0}}, {"optimizer__meta_experience_replay": {"every": 2, "factor": 1.0}}],
    ids=["gate", "replay"],
)
def test_a_method_that_changes_nothing_leaves_every_bit(run_ranks: RunRanks, tmp_path: Path, neutral: dict[str, object]) -> None:
    run_ranks(2, train, write_run(tmp_path / "plain"))
    run_ranks(2, train, write_run(tmp_path / "neutral", **neutral))
    assert losses(tmp_path / "neutral/run") == losses(tmp_path / "plain/run")
    plain, changed = (master_weights(tmp_path / name / CHECKPOINTS / "step_00000008") for name in ("plain", "neutral"))
    assert all(torch.equal(changed[key], value) for key, value in plain.items())


def test_a_method_that_begins_at_a_checkpoint_says_so(run_ranks: RunRanks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(1, train, write_run(tmp_path), ["train.steps=3"])
    run_ranks(1, train, write_run(tmp_path, optimizer__meta_experience_replay={"every": 2, "factor": 0.5}))
    assert "methods: reptile_anchor of 21 parameters begins anew" in " ".join(capfd.readouterr().out.split())
    capfd.readouterr()
    run_ranks(1, train, write_run(tmp_path), ["train.steps=9"])
    assert "adamw: reptile_anchor of 21 parameters dropped" in " ".join(capfd.readouterr().out.split())
