"""TransformerEngine's adapter on a package with its signatures that computes in plain PyTorch, and on packages that differ."""

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import transformer_engine
from megatron_ext.kernels.accelerators.transformer_engine import RECIPES, Linear
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.gpt import GPT
from megatron_ext.model.precision import set_recipe
from megatron_ext.precision.options import PrecisionOptions
from megatron_ext.precision.recipe import Recipe
from megatron_ext.precision.state import PrecisionState
from tests.kernels.accelerators.conftest import Install

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Parameters as TransformerEngine 2.9 to 2.20 declare them. Like theirs, the module refuses sides that the formats cannot divide.
PYTORCH = """
from contextlib import contextmanager

import torch
from torch import nn

active, calls = [], []

class Linear(nn.Module):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None, parallel_mode=None,
        parameters_split=None, device="cuda", name=None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.ones(out_features)) if bias else None

    def forward(self, inp, is_first_microbatch=None):
        assert active and inp.shape[0] > 0 and inp.shape[0] % 32 == 0 and inp.dtype == self.weight.dtype
        calls.append((active[-1], tuple(inp.shape)))
        return nn.functional.linear(inp, self.weight, self.bias)

@contextmanager
def autocast(enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
    active.append(type(recipe).__name__)
    yield
    active.pop()

def is_fp8_available(return_reason=False):
    return (True, "") if return_reason else True

is_fp8_block_scaling_available = is_mxfp8_available = is_fp8_available

def is_nvfp4_available(return_reason=False):
    reason = "a reason of its own"
    return (False, reason) if return_reason else False
"""
RECIPE = "\n".join(f"class {recipe.constructor}: pass" for recipe in RECIPES.values())


def files(pytorch: str = PYTORCH, recipe: str = RECIPE) -> dict[str, str]:
    package = "transformer_engine"
    sources = {"pytorch/__init__.py": pytorch, "common/recipe/__init__.py": recipe, "__init__.py": "", "common/__init__.py": ""}
    return {f"{package}/{path}": source for path, source in sources.items()}


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had a GPU of compute capability 10.0, and its tensors were on the CPU."""
    monkeypatch.setattr(transformer_engine, "gpu_obstacle", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize("tokens", [64, 37, 1, 0])
@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_blockwise", "mxfp8"])
def test_a_linear_with_its_gradients_in_the_recipe_asked_for(install: Install, recipe: str, tokens: int) -> None:
    install("transformer_engine", "2.20.2", files())
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(96, 64, generator=generator, dtype=torch.float64))
    x = torch.randn(tokens, 64, generator=generator, dtype=torch.float64).requires_grad_()
    linear = Linear(weight, recipe)
    out, expected = linear(x), x @ weight.mT
    assert out.shape == (tokens, 96)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (out, expected)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)
    assert sys.modules["transformer_engine.pytorch"].calls == [(RECIPES[recipe].constructor, (32 if tokens < 32 else 64, 64))]
    linear(x).sum().backward()
    assert weight.grad is not None and weight.grad.shape == (96, 64)


@pytest.mark.usefixtures("blackwell")
def test_its_own_word_on_the_gpu_is_the_last(install: Install) -> None:
    install("transformer_engine", "2.20.2", files())
    report = transformer_engine.status(CUDA)
    assert (report.name, report.version) == ("TransformerEngine", "2.20.2")
    able = [service for service, obstacle in report.services.items() if obstacle is None]
    assert able == ["linear in fp8_tensorwise", "linear in fp8_blockwise", "linear in mxfp8"]
    assert report.services["linear in nvfp4"] == "has other needs: a reason of its own"
    assert report.services["fp8_gemm, nvfp4_gemm"] == "documents no product of matrices that are quantized already"
    with pytest.raises(ConfigError, match="linear in nvfp4 by TransformerEngine has other needs: a reason of its own"):
        Linear(nn.Parameter(torch.zeros(32, 32)), "nvfp4")


@pytest.mark.usefixtures("blackwell")
def test_unknown_recipes_and_shapes_are_refused(install: Install) -> None:
    install("transformer_engine", "2.20.2", files())
    with pytest.raises(ConfigError, match="no recipe 'mxfp4'; accepted are fp8_tensorwise, fp8_blockwise, mxfp8, nvfp4"):
        Linear(nn.Parameter(torch.zeros(32, 32)), "mxfp4")
    for shape in ((48, 32), (32, 40)):
        with pytest.raises(ConfigError, match=rf"linear of \[{shape[0]}, {shape[1]}\] .* multiples of 32"):
            Linear(nn.Parameter(torch.zeros(shape)), "mxfp8")


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize(
    ("pytorch", "recipe", "reason"),
    [
        (PYTORCH.replace('device="cuda", ', ""), RECIPE, "Linear is called with .* got an unexpected keyword argument 'device'"),
        (PYTORCH.replace("def autocast", "def fp8_autocast"), RECIPE, "transformer_engine.pytorch.autocast is not there"),
        (PYTORCH.replace("is_nvfp4_available(return_reason=False)", "is_nvfp4_available()"), RECIPE, "'return_reason'"),
        (PYTORCH, RECIPE.replace("NVFP4BlockScaling", "FP4"), "transformer_engine.common.recipe.NVFP4BlockScaling is not there"),
    ],
)
def test_a_package_that_differs_is_refused_whole(install: Install, pytorch: str, recipe: str, reason: str) -> None:
    install("transformer_engine", "2.5", files(pytorch, recipe))
    with pytest.raises(ConfigError, match=f"differs from TransformerEngine 2.9 to 2.20, for which this adapter is written: .*{reason}"):
        Linear(nn.Parameter(torch.zeros(32, 32)), "fp8_tensorwise")


def test_without_package_or_gpu_the_first_reason_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("transformer_engine", "2.20.2", files())
    services = transformer_engine.status(CPU).services
    assert {services[f"linear in {name}"] for name in RECIPES} == {"needs a CUDA device, not cpu"}
    assert "transformer_engine" not in sys.modules
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(transformer_engine, "present", lambda _: False)
    services = transformer_engine.status(CUDA).services
    assert services["linear in fp8_blockwise"] == "needs the package transformer_engine, which is not installed"
    assert services["linear in nvfp4"] == "needs a GPU of compute capability 10.0 or newer"


@pytest.mark.usefixtures("blackwell")
def test_the_linears_of_a_model_are_its_own(install: Install) -> None:
    install("transformer_engine", "2.20.2", files())
    pack = (torch.arange(37) % 50, torch.arange(37), torch.tensor([0, 37], dtype=torch.int32), 37, torch.arange(37) % 49, torch.ones(37))
    grads = []
    for recipe in (PrecisionOptions(), PrecisionOptions(recipe="mxfp8", backend="transformer_engine", high_precision_first=1)):
        model = GPT(ModelConfig(64, 32, 64, 3, 4, 4, 8, 64, qkv_bias=True), "sdpa")
        model.reset_parameters(seed=0)
        set_recipe(model, Recipe(recipe), PrecisionState(seed=0))
        model(*pack)[0].backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)
    assert len(sys.modules["transformer_engine.pytorch"].calls) == 2 * 7, "one block of three is kept"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"recipe": "fp8_rowwise"},
            "recipe: 'fp8_rowwise'; accepted: with backend transformer_engine: fp8_tensorwise, fp8_blockwise",
        ),
        ({"recipe": "nvfp4", "hadamard": False}, "hadamard: false; accepted: null with backend transformer_engine"),
        ({"recipe": "mxfp8", "gemms": ["forward"]}, r"gemms: \['forward'\]; accepted: \['forward', 'input_gradient', 'weight_gradient'\]"),
    ],
)
def test_switches_that_it_has_not_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrecisionOptions(backend="transformer_engine", **keys)
