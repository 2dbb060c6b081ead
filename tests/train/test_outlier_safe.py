"""The recipe as it is shipped, on less data: it trains, goes on where it stopped, and is handed out as a plain Llama."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint.hf import load_hf_config, load_hf_weights
from megatron_ext.model.gpt import GPT
from tests.distributed import RunRanks
from tests.train.tiny_run import ROOT, VOCAB, losses, master_weights, random_documents, train, write_corpus

RECIPE = ROOT / "examples" / "configs" / "outlier_safe.yaml"


def overrides(folder: Path, run: str) -> list[str]:
    """The recipe's model, narrower, on random documents."""
    prose = folder / "prose"
    source = "{name: prose, path: %s}" % (prose if prose.with_suffix(".bin").exists() else write_corpus(prose, random_documents(60, 40)))
    shape = ["hidden_size=32", "intermediate_size=48", "num_layers=2", f"vocab_size={VOCAB}"]
    return [
        *(f"run_dir={folder / run}", "tokenizer=null", f"data.sources=[{source}]", f"data.validation=[{source}]"),
        *(f"model.{each}" for each in shape),
        *("data.sequence_length=32", "data.tokens_per_step=256", "planning.tokens_per_pack=128", "schedule.warmup_steps=2"),
        *("train.steps=4", "train.dtype=float32", "train.threads_per_rank=1", "evaluation.tokens=64", "evaluation.every=4"),
        *("logging.every=1", "checkpoint.every=2"),
    ]


def test_the_recipe_trains_resumes_and_is_exported(run_ranks: RunRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(2, train, RECIPE, overrides(tmp_path, "whole"))
    whole, resumed = (tmp_path / name / "checkpoints" for name in ("whole", "resumed"))
    shutil.copytree(whole / "step_00000002", resumed / "step_00000002")
    run_ranks(2, train, RECIPE, [*overrides(tmp_path, "resumed"), f"checkpoint.resume={resumed / 'step_00000002'}"])
    seen, expected = (master_weights(each / "step_00000004") for each in (resumed, whole))
    assert seen.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in seen.items())
    assert losses(tmp_path / "resumed") == {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 2}
    muon = {name.split("|")[0] for name in expected if name.endswith("|momentum_buffer")}
    assert {"model.embed_projection.weight", "model.head_projection.weight"} < muon
    assert not {name for name in muon if "norm" in name or "embed_tokens" in name or "lm_head" in name}

    divided = ["parallel.tp=2", "parallel.sequence_parallel_activations=true", "checkpoint.every=null"]
    run_ranks(2, train, RECIPE, [*overrides(tmp_path, "divided"), *divided])
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "divided")[step] == pytest.approx(loss, rel=1e-4)

    monkeypatch.syspath_prepend(ROOT / "tools")
    import convert_checkpoint

    last, plain = whole / "step_00000004", tmp_path / "plain"
    assert load_hf_config(last).norm.kind == "ss"
    assert convert_checkpoint.main(["export", str(last), str(plain)]) == 0
    model = GPT(load_hf_config(last), "dense")
    load_hf_weights(model, last)
    tokens = torch.arange(30)
    expected_logits = model.logits(tokens, tokens, torch.tensor([0, 30], dtype=torch.int32), 30)
    theirs = AutoModelForCausalLM.from_pretrained(plain)
    assert theirs.config.model_type == "llama"
    assert (theirs(tokens[None]).logits[0] - expected_logits).abs().max() < 2e-5
    sys.modules.pop("convert_checkpoint")
