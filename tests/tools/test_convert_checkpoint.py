"""The command line that brings Hugging Face models in and hands checkpoints out."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_ext.atomic_io import write_json
from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights, save_hf
from megatron_ext.checkpoint.manifest import file_entry, seal
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions
from tests.tools.loading import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("convert_checkpoint")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small model with a tokenizer file, and the leftovers of a run beside it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16, eos_token_id=[3, 4]))
    directory = tmp_path / "source"
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"model": {}}')
    (directory / "optimizer").mkdir()
    (directory / "optimizer" / "master.safetensors").write_bytes(b"state")
    return directory


def test_import_then_export_keeps_logits_and_leaves_the_state_behind(
    tool: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    assert tool.main(["import", str(source), str(imported), "--max-shard-gib", "0.00001"]) == 0
    assert "parameters as float32" in capsys.readouterr().out
    assert len(list(imported.glob("model-*.safetensors"))) > 1

    assert tool.main(["export", str(imported), str(exported)]) == 1
    assert "no trainer_state.json" in capsys.readouterr().err
    write_json(imported / "trainer_state.json", seal({"step": 1, "files": {}}))
    assert tool.main(["export", str(imported), str(exported)]) == 0
    assert {path.name for path in exported.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert (exported / "tokenizer.json").read_text() == '{"model": {}}'
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == [3, 4]

    tokens = torch.arange(20)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, exported)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    assert logits[0].std() > 1e-3


def test_import_converts_the_dtype(tool: ModuleType, source: Path, tmp_path: Path) -> None:
    assert tool.main(["import", str(source), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_errors_name_the_file_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    command = [sys.executable, str(TOOL), "import", str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: config.json: model_type is 'mixtral'")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_an_existing_target_is_not_overwritten(tool: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (source / "config.json").read_bytes()
    assert tool.main(["import", str(source), str(source)]) == 1
    assert "exists" in capsys.readouterr().err
    assert (source / "config.json").read_bytes() == before


def test_renorm_writes_the_same_function_with_other_norms(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(61, 24, 40, 2, 6, 2, 4, 64, init_std=0.2, norm=NormOptions("layer"))
    model = GPT(config, "dense").double()
    model.reset_parameters(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    save_hf(model.named_parameters(), config, tmp_path / "layer", 2**30, dtype=torch.float64)
    tokens = torch.arange(20)

    def logits(directory: Path) -> torch.Tensor:
        found = GPT(load_hf_config(directory), "dense").double()
        load_hf_weights(found, directory)
        return found.logits(tokens, tokens, torch.tensor([0, 20], dtype=torch.int32), 20)

    for source, kind in (("layer", "rms"), ("layer", "crms"), ("rms", "crms")):
        target = tmp_path / (kind if source == "layer" else "crms_of_rms")
        assert tool.main(["renorm", str(tmp_path / source), str(target), "--kind", kind]) == 0
        assert load_hf_config(target).norm.kind == kind
        assert (logits(target) - logits(tmp_path / "layer")).abs().max() < 1e-10
    assert tool.main(["renorm", str(tmp_path / "rms"), str(tmp_path / "again"), "--kind", "rms"]) == 1
    assert "model.norm.kind 'rms' with placement 'pre'; accepted here: 'layer'" in capsys.readouterr().err
    for wrong, message in ((["renorm"], "arguments are required: --kind"), (["import", "--kind", "rms"], "unrecognized arguments: --kind")):
        with pytest.raises(SystemExit):
            tool.main([*wrong, str(tmp_path / "layer"), str(tmp_path / "none")])
        assert message in capsys.readouterr().err


def test_export_folds_what_it_can_and_refuses_the_rest(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for placement, status in (("pre", 0), ("peri", 1)):
        config = ModelConfig(61, 24, 40, 2, 6, 2, 4, 64, norm=NormOptions("ss", placement), embedding_projection=True)
        model = GPT(config, "dense")
        model.reset_parameters(0)
        source, target = tmp_path / placement, tmp_path / f"{placement}_out"
        save_hf(model.named_parameters(), config, source, 2**30, dtype=torch.float32)
        write_json(source / "trainer_state.json", seal({"step": 1, "files": {}}))
        assert tool.main(["export", str(source), str(target)]) == status
        assert target.exists() == (status == 0)
        assert not list(tmp_path.glob(".*.tmp"))
    assert "model.norm.placement 'peri': this cannot be folded" in capsys.readouterr().err
    assert json.loads((tmp_path / "pre_out" / "config.json").read_text())["model_type"] == "llama"


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three models of one shape, in float32."""
    directories = [tmp_path / name for name in "abc"]
    for seed, directory in enumerate(directories):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2)).save_pretrained(directory)
        (directory / "tokenizer.json").write_text(directory.name)
    return directories


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], [1 / 3, 1 / 3, 1 / 3]),
        (["--weights", "1", "0", "3"], [0.25, 0.0, 0.75]),
        (["--ema", "0.9"], [0.81, 0.09, 0.1]),
    ],
)
def test_average_is_the_mean_and_loads(
    tool: ModuleType, three: list[Path], tmp_path: Path, options: list[str], weights: list[float]
) -> None:
    target = tmp_path / "mean"
    assert tool.main(["average", *map(str, three), "--output", str(target), "--max-shard-gib", "0.00001", *options]) == 0
    models = [AutoModelForCausalLM.from_pretrained(path).double().state_dict() for path in three]
    averaged = AutoModelForCausalLM.from_pretrained(target)
    for name, value in averaged.state_dict().items():
        mean = sum(weight * model[name] for weight, model in zip(weights, models, strict=True))
        assert torch.equal(value, mean.float()) or (value - mean).abs().max() <= 6e-8 * mean.abs().max(), name
        assert name.endswith("norm.weight") or not torch.equal(value, models[2][name].float())
    record = json.loads((target / "averaged.json").read_text())
    assert record["sources"] == list(map(str, three)) and record["weights"] == pytest.approx(weights)
    assert (target / "tokenizer.json").read_text() == "c" and len(list(target.glob("model-*.safetensors"))) > 1


def test_average_adds_up_in_more_than_the_precision_of_the_weights(tool: ModuleType, tmp_path: Path) -> None:
    """The mean of many equal bfloat16 models is that model, and of two neighbours is rounded once."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2)).bfloat16()
    model.save_pretrained(tmp_path / "half")
    same = [str(tmp_path / "half")] * 7
    assert tool.main(["average", *same, "--output", str(tmp_path / "mean")]) == 0
    assert tool.main(["average", *same, "--output", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    for found in ("mean", "wide"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / found, dtype="auto")
        assert loaded.dtype == (torch.bfloat16 if found == "mean" else torch.float32)
        assert all(torch.equal(value, model.state_dict()[name].to(value.dtype)) for name, value in loaded.state_dict().items())


def test_average_refuses_what_has_no_mean(tool: ModuleType, three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"num_hidden_layers": 1}, num_key_value_heads=2)).save_pretrained(other)
    models = list(map(str, three))
    for arguments, message in (
        ([*models, str(other)], "other: num_layers is 1, in "),
        ([*models, "--weights", "1", "2"], "--weights 1 2; accepted: 3 numbers, one a model, at least 0 and not all 0"),
        ([*models, "--weights", "1", "-2", "3"], "--weights 1 -2 3; accepted: 3 numbers"),
        ([*models, "--weights", "0", "0", "0"], "not all 0"),
        ([*models, "--ema", "1"], "--ema 1.0; accepted: at least 0 and less than 1"),
        (models[:1], "1 model; accepted: two or more"),
        ([*models, str(tmp_path / "none")], "none/config.json does not exist"),
    ):
        assert tool.main(["average", *arguments, "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(SystemExit):
        tool.main(["average", *models, "--output", str(tmp_path / "out"), "--ema", "0.5", "--weights", "1"])


def test_average_notices_a_damaged_checkpoint(
    tool: ModuleType, three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"model.safetensors": file_entry(three[0] / "model.safetensors")}
    write_json(three[0] / "trainer_state.json", seal({"step": 1, "files": files}))
    command = ["average", *map(str, three), "--output"]
    assert tool.main([*command, str(tmp_path / "whole")]) == 0
    weights = bytearray((three[0] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (three[0] / "model.safetensors").write_bytes(weights)
    assert tool.main([*command, str(tmp_path / "damaged")]) == 1
    assert "model.safetensors is altered" in capsys.readouterr().err
