"""What computes the norms of a model is chosen by name, and gives the model's loss and gradients."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import apex
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.norm_kinds import set_backend
from megatron_ext.model.norm_options import NormKind, NormOptions
from tests.kernels.accelerators import conftest, test_apex

install = conftest.install
CPU = torch.device("cpu")
MODEL = ModelConfig(51, 32, 48, 2, 4, 4, 8, 64, qk_norm=True)
PACK = (torch.arange(40) % 50, torch.arange(40), torch.tensor([0, 40], dtype=torch.int32), 40, torch.arange(40) % 49, torch.ones(40))


def gradients(kind: NormKind, backend: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What is said of the backend, and the gradients of a pack."""
    model = GPT(replace(MODEL, norm=NormOptions(kind)), "sdpa")
    model.reset_parameters(seed=0)
    said = set_backend(model, backend, CPU, torch.float32)
    model(*PACK)[0].backward()
    return said, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["rms", "ss"])
def test_fused_kernels_give_the_gradients_of_the_definition(kind: NormKind) -> None:
    (said_torch, expected), (said_auto, found) = gradients(kind, "torch"), gradients(kind, "auto")
    assert (said_torch, said_auto) == ("torch (as asked for)", "cpu (auto: on cpu)")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items()), "another order of sums is seen"


def test_apex_computes_where_it_can_and_says_why_not(install: conftest.Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("apex", "0.1", test_apex.files())
    with pytest.raises(ConfigError, match="norm_backend: 'apex'; accepted here: torch, auto, because RMSNorm by apex needs a CUDA device"):
        gradients("rms", "apex")
    monkeypatch.setattr(apex, "gpu_obstacle", lambda *_: None)
    with pytest.raises(ConfigError, match="because RMSNorm by apex has no norms with one gain"):
        gradients("ss", "apex")
    (said, found), (_, expected) = gradients("rms", "apex"), gradients("rms", "torch")
    assert said == "apex (version 0.1)"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_norms_are_of_pytorch_until_something_else_is_asked_for() -> None:
    assert all(module.backend == "torch" for module in GPT(MODEL).modules() if isinstance(module, RMSNorm))
