"""Folded models against the models that they are made of, as transformers computes them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint.fold import fold
from megatron_ext.checkpoint.hf import in_order, save_hf
from megatron_ext.errors import CheckpointError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm_options import NormOptions

CONFIG = ModelConfig(61, 48, 80, 3, 6, 2, 8, 64, norm_eps=1e-6, init_std=0.1)
TOKENS = torch.randint(61, (40,), generator=torch.Generator().manual_seed(1))
FOLDABLE = {
    "osp": {"norm": NormOptions("ss"), "embedding_projection": True},
    "everything": {"norm": NormOptions("ss", "pre", True, True), "embedding_projection": True, "tie_embeddings": True},
    "rms_scaled": {"norm": NormOptions(depth_scaling=True, embedding_norm=True)},
    "tied_stays_tied": {"norm": NormOptions("ss"), "tie_embeddings": True},
    "qwen3": {"norm": NormOptions("ss"), "qk_norm": True, "embedding_gradient_shrink": 0.1},
    "qwen2": {"embedding_projection": True, "qkv_bias": True},
}


def trained(config: ModelConfig) -> GPT:
    """A model none of whose parameters is where it started."""
    model = GPT(config, "dense")
    model.reset_parameters(0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += (0.05 if "projection" in name else 0.2) * torch.randn(parameter.shape, generator=generator)
    return model


def our_logits(model: GPT) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS, torch.arange(len(TOKENS)), torch.tensor([0, len(TOKENS)], dtype=torch.int32), len(TOKENS))


@pytest.mark.parametrize("case", FOLDABLE)
def test_logits_of_the_folded_model_equal_those_of_the_model(case: str, tmp_path: Path) -> None:
    model = trained(replace(CONFIG, **FOLDABLE[case]))
    read, folded = fold(model.get_parameter, model.config)
    save_hf(in_order(read, folded), folded, tmp_path, 2**30, dtype=torch.float32)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(theirs).__name__.lower().startswith(case if case.startswith("qwen") else "llama")
    assert theirs.config.tie_word_embeddings == (case == "tied_stays_tied")
    expected = our_logits(model)
    assert (theirs(TOKENS[None]).logits[0] - expected).abs().max() < 2e-5 * max(1.0, float(expected.std()))
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    "left_out",
    [
        {"norm": NormOptions("ss", "pre", False, True)},
        {"norm": NormOptions("ss", "pre", True, False)},
        {"embedding_projection": False},
        {"tie_embeddings": False},
    ],
)
def test_what_is_left_out_is_seen(left_out: dict[str, object]) -> None:
    """The same fold for a model that is said not to have one of the parts."""
    model = trained(replace(CONFIG, **FOLDABLE["everything"]))
    told = replace(model.config, **left_out)
    parameters = dict(model.named_parameters()) | {"lm_head.weight": torch.randn(61, 48) / 7}
    read, folded = fold(parameters.__getitem__, told)
    plain = GPT(folded, "dense")
    plain.load_state_dict(dict(in_order(read, folded)))
    expected = our_logits(model)
    assert (our_logits(plain) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm": NormOptions("ss", "peri"), "embedding_projection": True},
            r"model.norm.kind 'ss', model.norm.placement 'peri': this cannot be",
        ),
        ({"norm": NormOptions("rms", "post")}, "model.norm.placement 'post': this cannot be folded"),
        ({"norm": NormOptions("rms", "mix")}, "model.norm.placement 'mix': this cannot be folded"),
        *(({"norm": NormOptions(kind)}, f"model.norm.kind '{kind}': this cannot be folded") for kind in ("crms", "power", "unified")),
        ({"norm": NormOptions("layer")}, "model.norm.kind 'layer': this cannot be folded .* renorm makes rms of layer"),
        ({"norm": NormOptions("ss"), "qk_norm": True, "qkv_bias": True}, "model.qk_norm together with model.qkv_bias: this cannot"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    config = replace(CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message):
        fold(trained(config).get_parameter, config)
