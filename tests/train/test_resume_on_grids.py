"""A run that moves from grid to grid goes on as if it had not moved, and its checkpoints are models wherever they were written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, save_hf
from megatron_ext.model.gpt import GPT, parameter_shapes
from megatron_ext.model.placements import parameter_boxes
from megatron_ext.parallel.group import Group, Traffic
from megatron_ext.parallel.pipeline import Stage
from megatron_ext.parallel.placement import slices, whole_box
from megatron_ext.parallel.tensor import TensorParallel
from tests.distributed import RunRanks
from tests.train.tiny_run import losses, master_weights, train, write_run

GRIDS = {
    "dp1": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4": (4, ["parallel.tp=4", "parallel.sequence_parallel_activations=true"]),
    "pp2": (2, ["parallel.pp=2", "parallel.partition=time"]),
    "pp2dp2": (4, ["parallel.pp=2", "parallel.layers_per_stage=[0, 2]"]),
    "pp2tp2": (4, ["parallel.pp=2", "parallel.tp=2", "train.activation_checkpointing=full"]),
}
OPTIONS = {"train__dtype": "float64", "checkpoint__every": 2, "train__check_replicas_every": 1, "optimizer__eps": 1e-4}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stayed(request: pytest.FixtureRequest, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    """A run that stayed on one process."""
    folder = tmp_path_factory.mktemp("stayed")
    run_ranks(1, train, write_run(folder, model__tie_embeddings=request.param, **OPTIONS))
    return request.param, folder


@pytest.mark.parametrize("journey", [("tp2", "pp2", "dp2", "dp1"), ("pp2tp2", "tp4", "pp2dp2", "pp2tp2")], ids="-".join)
def test_a_run_goes_on_across_grids(run_ranks: RunRanks, tmp_path: Path, stayed: tuple[bool, Path], journey: tuple[str, ...]) -> None:
    tied, _ = stayed
    config = write_run(tmp_path, model__tie_embeddings=tied, **OPTIONS)
    for leg, name in enumerate(journey, start=1):
        ranks, overrides = GRIDS[name]
        # The schedule is that of the whole run: only the last leg may reach its end.
        run_ranks(ranks, train, config, [*overrides, "schedule.kind=constant", f"train.steps={2 * leg}"])
    run_ranks(1, train, write_run(tmp_path / "stayed", model__tie_embeddings=tied, **OPTIONS), ["schedule.kind=constant"])
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "stayed" / "run"), rel=1e-9)
    seen, expected = master_weights(checkpoint(tmp_path, 8)), master_weights(checkpoint(tmp_path / "stayed", 8))
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert (seen[name] - value).abs().max() <= 1e-8 * value.abs().max(), name


@pytest.mark.parametrize("name", ["tp4", "pp2tp2", "pp2dp2"])
def test_the_export_of_any_grid_is_the_model(run_ranks: RunRanks, tmp_path: Path, name: str) -> None:
    ranks, overrides = GRIDS[name]
    run_ranks(ranks, train, write_run(tmp_path, model__tie_embeddings=name == "pp2tp2", train__steps=2), overrides)
    exported = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path, 2))
    masters = {key.split("|")[0]: value for key, value in master_weights(checkpoint(tmp_path, 2)).items() if key.endswith("|master")}
    found = dict(exported.named_parameters())
    assert found.keys() == masters.keys()
    assert all(torch.equal(found[parameter], value) for parameter, value in masters.items())


@pytest.mark.parametrize(
    ("size", "stage"), [(1, Stage(range(0, 1), True, False)), (4, Stage(range(1, 2), False, True)), (3, Stage(range(2), True, True))]
)
def test_a_rank_reads_its_part_of_exported_weights(stayed: tuple[bool, Path], size: int, stage: Stage) -> None:
    _, folder = stayed
    directory = checkpoint(folder, 8)
    config = load_hf_config(directory)
    whole = {key.split("|")[0]: value for key, value in master_weights(directory).items() if key.endswith("|master")}
    if size == 3:
        config = replace(config, num_heads=3, num_kv_heads=3)
        whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in parameter_shapes(config).items()}
        directory = folder / "three"
        save_hf(whole.items(), config, directory, 2**30, dtype=torch.float64)
    for rank in range(size):
        tp = TensorParallel(Group("tp", tuple(range(size)), rank, None, Traffic()))
        model = GPT(config, tp=tp, stage=stage).double()
        load_hf_weights(model, directory)
        for name, (shape, box) in parameter_boxes(model).items():
            assert shape == whole[name].shape
            assert torch.equal(model.get_parameter(name), whole[name][slices(box, whole_box(shape))]), name
