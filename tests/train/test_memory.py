"""Estimated bytes against those of the tensors that a model and its optimizer really hold."""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.hf_config import config_to_hf
from megatron_ext.config import RunConfig, load_config
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.distillation import hidden_distance, linear_kl_divergence
from megatron_ext.model.gpt import GPT
from megatron_ext.model.loss import linear_cross_entropy
from megatron_ext.model.mlp import set_tile
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.placements import placements
from megatron_ext.model.precision import set_recipe
from megatron_ext.optim.main_gradients import MainGradients
from megatron_ext.optim.options import OptimizerOptions, RuleName
from megatron_ext.parallel.device import HostTransfer
from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.options import ParallelOptions
from megatron_ext.parallel.pipeline import stages
from megatron_ext.parallel.tensor import DividedLinear, TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.precision.operands import stripped
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState
from megatron_ext.train.build import build_optimizer
from megatron_ext.train.dry_run import dry_run
from megatron_ext.train.memory import grids, largest_rank, rank_memory
from tests.distributed import RunRanks
from tests.peak_memory import peak_bytes
from tests.train.tiny_run import write_run

MODEL = ModelConfig(512, 64, 160, 4, 8, 4, 8, 256)
TOKENS = 192


def config_of(path: str, *overrides: str) -> RunConfig:
    return load_config(path, [f"data.sequence_length={TOKENS}", "data.tokens_per_step=1024", *overrides])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("memory")))


def held_for_backward(model: GPT) -> int:
    """Bytes of all storages, parameters left out, that are kept when a pack of one document has passed the blocks and not yet the loss."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(TOKENS, dtype=torch.int64)
    boundaries = torch.tensor([0, TOKENS], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack = model.context(torch.arange(TOKENS), boundaries, TOKENS)
        x = model.embed(tokens) if model.stage.is_first else torch.zeros(TOKENS, MODEL.hidden_size, requires_grad=True)
        x = model.blocks(x, pack)
        out = model.head_input(x, TOKENS) if model.stage.is_last else x
    # What selective recomputation keeps lies in dictionaries of Python, not in autograd's graph.
    cached = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before and not isinstance(o, torch.nn.Parameter)]
    for tensor in [*cached, out]:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for pointer, size in saved.items() if pointer not in ours)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "model",
    [
        *(MODEL, replace(MODEL, qk_norm=True), replace(MODEL, num_kv_heads=8, intermediate_size=64)),
        replace(MODEL, norm=NormOptions("ss", "peri", embedding_norm=True), embedding_projection=True),
        replace(MODEL, norm=NormOptions("layer", "post")),
        replace(MODEL, norm=NormOptions("crms", "mix", depth_scaling=True)),
        replace(MODEL, norm=NormOptions("power", "peri")),
    ],
)
def test_activations_are_those_that_autograd_keeps(path: str, recompute: str, model: ModelConfig) -> None:
    config = config_of(path, f"train.activation_checkpointing={recompute}")
    measured = held_for_backward(GPT(model, "sdpa", recompute))
    assert rank_memory(config, model, GridShape(1, 1, 1), 0, torch.float32).activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("recompute", "offload"), [("none", False), ("selective", False), ("selective", True), ("full", True)])
def test_tiles_and_offloading_are_counted(path: str, recompute: str, offload: bool) -> None:
    keys = [f"train.activation_checkpointing={recompute}", f"train.offload_activations={str(offload).lower()}", "train.mlp_tile_tokens=16"]
    model = GPT(MODEL, "sdpa", recompute)
    set_tile(model, 16)
    model.offload = HostTransfer(torch.device("cpu")) if offload else None
    tiled, plain = (rank_memory(config_of(path, *keys[:n]), MODEL, GridShape(1, 1, 1), 0, torch.float32) for n in (3, 1))
    assert tiled.activations + tiled.host == pytest.approx(held_for_backward(model), rel=0.1)
    assert bool(tiled.host) == offload and tiled.total + tiled.host == sum(asdict(tiled).values())
    assert tiled.activations < 0.8 * plain.activations or recompute == "full"
    if offload:
        inputs = MODEL.num_layers * TOKENS * MODEL.hidden_size * 4
        assert tiled.host == inputs * (2 if recompute == "selective" else 1)


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_computed_again_is_one_block(path: str, recompute: str, tile: int | None) -> None:
    keys = [f"train.activation_checkpointing={recompute}", f"train.mlp_tile_tokens={tile or 'null'}"]
    memory = rank_memory(config_of(path, *keys), MODEL, GridShape(1, 1, 1), 0, torch.float32)
    model = GPT(replace(MODEL, num_layers=1), "sdpa")
    set_tile(model, tile)
    tokens, block = torch.arange(TOKENS), model.model.layers["0"]
    pack = model.context(tokens, torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    x = torch.zeros(TOKENS, MODEL.hidden_size, requires_grad=True)
    # On a CPU sdpa returns heads before tokens, so that its output is there once more in the order of the projection.
    output_again = TOKENS * 64 * 4
    whole = kept_by(lambda: block(x, pack), block) - pack.cos.nbytes - pack.sin.nbytes - output_again
    part = 0 if tile is None else kept_by(lambda: block.mlp._gated(x[:tile]), block) - x.nbytes
    selected = 4 * TOKENS * (2 * 64 + 2 * 32 + 64 + (0 if tile else 2 * 160 + 64))
    expected = {"none": 0, "selective": whole - selected, "full": whole}[recompute] + part
    assert memory.recomputed == pytest.approx(expected, rel=0.03)


def kept_by(function: Callable[[], torch.Tensor], module: torch.nn.Module) -> int:
    """Bytes of storages that autograd keeps of ``function``, parameters left out."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in {p.untyped_storage().data_ptr() for p in module.parameters()})


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4", "mxfp8", "fp8_blockwise", "fp8_tensorwise"])
@pytest.mark.parametrize("keys", [[], ["precision.stash=false"], ["precision.high_precision_names=['*.k_proj.weight', '*.o_proj.weight']"]])
def test_codes_are_counted(path: str, recipe: str, keys: list[str]) -> None:
    config = config_of(path, f"precision.recipe={recipe}", *keys)
    model = GPT(MODEL, "sdpa")
    set_recipe(model, Recipe(config.precision), PrecisionState(seed=0))
    linears = [module for module in model.modules() if isinstance(module, DividedLinear) and module.precision is not None]
    pairs = [linear.precision.weight(linear.weight) for linear in linears]
    codes = sum(tensor.nbytes for pair in pairs for each in pair for tensor in stripped(each)[0])
    memory, plain = (rank_memory(each, MODEL, GridShape(1, 1, 1), 0, torch.float32) for each in (config, config_of(path)))
    assert memory.activations == pytest.approx(held_for_backward(model), rel=0.1)
    assert (memory.activations < 0.95 * plain.activations) == config.precision.stash
    assert memory.parameters - plain.parameters == pytest.approx(codes, rel=0.02)


def states_on(world: World, shape: GridShape, dtype: torch.dtype, rule: RuleName) -> tuple[int, int, int]:
    """Bytes of parameters, main gradients and optimizer of this rank after a step."""
    grid = Grid(world, shape)
    model = GPT(MODEL, "sdpa", tp=TensorParallel(grid.tp), stage=stages([2] * shape.pp if shape.pp > 1 else [4])[grid.stage])
    model.reset_parameters(0)
    model.to(dtype)
    where = placements(model, grid, False)
    optimizer = build_optimizer(model, OptimizerOptions(rule=rule), grid)
    for parameter in model.parameters():
        parameter.sum().backward()
    gradients: MainGradients = optimizer.gradients
    main = sum(gradients[name].nbytes for name in where)
    optimizer.step()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = [owned.master.detach() for owned in optimizer.owned]
    tensors += [t for made in optimizer.rules.values() for state in made.state.values() for t in state.values() if t.ndim]
    held = sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().data_ptr() not in own)
    return sum(parameter.nbytes for parameter in model.parameters()), main, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [GridShape(1, 1, 1), GridShape(1, 2, 1), GridShape(1, 1, 2), GridShape(2, 1, 1)], ids=str)
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_states_are_those_of_the_optimizer(run_ranks: RunRanks, path: str, shape: GridShape, dtype: torch.dtype, rule: RuleName) -> None:
    config = config_of(
        path, f"parallel.pp={shape.pp}", "parallel.layers_per_stage=" + ("[2, 2]" if shape.pp == 2 else "null"), f"optimizer.rule={rule}"
    )
    for rank, measured in enumerate(run_ranks(shape.size, states_on, shape, dtype, rule)):
        memory = rank_memory(config, MODEL, shape, shape.coordinates(rank)[0], dtype)
        assert (memory.parameters, memory.gradients, memory.optimizer) == pytest.approx(measured, rel=0.1)


def test_the_weights_and_the_stream_of_a_teacher_are_counted(path: str) -> None:
    alone, taught = (
        rank_memory(config_of(path, *overrides), MODEL, GridShape(1, 2, 2), 0, torch.bfloat16)
        for overrides in ((), ("distillation={teacher: there, hidden: {weight: 1.0}}",))
    )
    stream, difference = TOKENS * 64 * 2, TOKENS * 64 * 4
    assert taught == replace(alone, parameters=2 * alone.parameters, activations=alone.activations + stream + difference)


def test_a_teacher_of_another_shape_is_counted_by_its_own(path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(replace(MODEL, hidden_size=128, num_layers=6), dtype="float32")))
    alone, taught = (
        rank_memory(config_of(path, *overrides), MODEL, GridShape(2, 1, 1), 1, torch.float32)
        for overrides in ((), (f"distillation={{teacher: {tmp_path}, kl: {{weight: 1.0}}}}",))
    )
    with torch.device("meta"):
        teacher = GPT(replace(MODEL, hidden_size=128, num_layers=6), stage=stages([3, 3])[1])
    assert taught.parameters - alone.parameters == 4 * sum(parameter.numel() for parameter in teacher.parameters())
    assert taught.activations - alone.activations == 2 * TOKENS * 128 * 4, "as it came from the first stage, and as it goes to the head"


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_distances_keep_is_counted(path: str, dtype: torch.dtype, kind: str) -> None:
    options = f"distillation={{teacher: there, hidden: {{weight: 1.0, kind: {kind}, layers: [0, 2, 4]}}}}"
    alone, taught = (rank_memory(config_of(path, *keys), MODEL, GridShape(1, 1, 1), 0, dtype) for keys in ((), (options,)))
    states = [torch.randn(TOKENS, 64).to(dtype).requires_grad_() for _ in range(3)]

    def losses() -> torch.Tensor:
        return torch.stack([hidden_distance(x, torch.randn_like(x).detach(), kind) @ torch.ones(TOKENS) for x in states]).sum()

    keeps = kept_by(losses, torch.nn.ParameterList(states if dtype == torch.float32 else []))
    ours = 0 if kind == "mse" or dtype != torch.float32 else 3 * TOKENS * 64 * 4
    stream = TOKENS * 64 * dtype.itemsize
    assert taught.activations - alone.activations - stream == pytest.approx(keeps + ours, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taught", [False, True])
def test_chunks_of_logits_are_what_the_losses_take_at_once(path: str, dtype: torch.dtype, taught: bool) -> None:
    model = replace(MODEL, vocab_size=4096)
    keys = ["train.loss_tile_tokens=48", "distillation={teacher: there, kl: {weight: 1.0}}"]
    memory = rank_memory(config_of(path, *keys[: 1 + taught]), model, GridShape(1, 1, 1), 0, dtype)
    hidden, weight = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (TOKENS, 4096))
    ones, labels = torch.ones(TOKENS), torch.zeros(TOKENS, dtype=torch.int64)

    def losses() -> list[torch.Tensor]:
        found = [linear_cross_entropy(hidden, weight, labels, ones, tile=48)[0]]
        if taught:
            found.append(linear_kl_divergence((hidden, weight), (hidden.detach().clone(), weight.detach()), ones, tile=48)[0])
        return found

    # A CPU adds bfloat16 to float32 by way of a float32 copy, a GPU does not.
    copied = weight.numel() * 4 if dtype == torch.bfloat16 and not taught else 0
    assert memory.logits == pytest.approx(peak_bytes(losses) - copied, rel=0.1)


def test_the_chunk_of_logits_is_that_of_the_device_of_the_estimate(path: str) -> None:
    config, model = config_of(path, "data.sequence_length=1024"), replace(MODEL, vocab_size=65536)
    cpu, gpu = (rank_memory(config, model, GridShape(1, 1, 1), 0, torch.bfloat16, torch.device(name)).logits for name in ("cpu", "cuda"))
    assert gpu - cpu == (1024 - 256) * 65536 * (4 + 2 + 2), "a GPU takes 1024 tokens at once, a CPU the fewest"
    told = [dry_run(load_config(path), gib=gib, device=device) for gib, device in ((1.0, None), (1.0, "cpu"), (None, None))]
    assert ["rank of stage 0, cuda" in text for text in told] == [True, False, torch.cuda.is_available()]


def test_more_division_needs_less(path: str) -> None:
    totals = [
        largest_rank(config_of(path), MODEL, shape, torch.bfloat16)[1]
        for shape in (GridShape(1, 1, 1), GridShape(2, 1, 1), GridShape(1, 1, 2))
    ]
    assert totals[0].parameters > totals[1].parameters and totals[0].parameters > 1.9 * totals[2].parameters
    zero = {
        stage: largest_rank(config_of(path, f"optimizer.sharding={stage}"), MODEL, GridShape(1, 4, 1), torch.bfloat16)[1]
        for stage in ("zero1", "zero2", "zero3")
    }
    assert zero["zero1"].gradients > 3.9 * zero["zero2"].gradients and zero["zero2"].parameters > 3.9 * zero["zero3"].parameters


def test_grids_are_those_that_divide(path: str) -> None:
    found = list(grids(config_of(path), MODEL, 8))
    assert found[0] == GridShape(1, 8, 1) and GridShape(1, 1, 8) in found and GridShape(8, 1, 1) not in found
    assert all(shape.size == 8 for shape in found)
    assert list(grids(config_of(path, "optimizer.sharding=zero2"), MODEL, 8)) == [GridShape(1, 8, 1)]
    assert all(ParallelOptions(tp=shape.tp, pp=shape.pp) for shape in found)


def test_the_tool_marks_what_fits(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import estimate_memory

    monkeypatch.setattr("sys.argv", ["estimate_memory.py", "--config", path, "--devices", "4", "--gib", "0.02", "model.num_layers=16"])
    assert estimate_memory.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["grid", "stage"]
    marks = [line.endswith("fits") for line in lines[1:]]
    assert marks == sorted(marks, reverse=True) and 0 < sum(marks) < len(marks)
    assert Path(path).exists()


def test_anchors_are_counted(path: str) -> None:
    plain, replay = (
        rank_memory(config_of(path, *keys), MODEL, GridShape(1, 2, 1), 0, torch.bfloat16).optimizer
        for keys in ([], ["optimizer.meta_experience_replay={every: 5, factor: 0.5}"])
    )
    assert replay / plain == pytest.approx(4 / 3, rel=1e-5)
