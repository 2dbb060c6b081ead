"""apex's adapter on a package with its signatures that computes in plain PyTorch, on packages that differ, and on its namesake."""

import sys

import pytest
import torch

from megatron_ext.errors import ConfigError
from megatron_ext.kernels.accelerators import apex
from megatron_ext.kernels.accelerators.apex import fused_adamw, rms_norm
from megatron_ext.optim.options import OptimizerOptions
from megatron_ext.optim.rules import build_rules
from megatron_ext.parallel.tensor import single
from tests.kernels.accelerators.conftest import Install

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# The parameters, the state and the arithmetic of apex 0.1: steps are counted by group, and decay is a part of the update.
OPTIMIZERS = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0., amsgrad=False,
        set_grad_none=True, capturable=False, master_weights=False,
    ):
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))
        assert adam_w_mode

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_((1 - beta1) * p.grad)
                v.mul_(beta2).add_((1 - beta2) * p.grad * p.grad)
                update = m / (1 - beta1 ** group["step"]) / ((v / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
"""
NORM = """
import torch

calls = []

def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append((tuple(normalized_shape), eps))
    return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
"""
NUMBERS = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def files(optimizers: str = OPTIMIZERS, norm: str = NORM) -> dict[str, str]:
    sources = {"__init__.py": "", "optimizers/__init__.py": optimizers, "normalization/__init__.py": ""}
    sources["normalization/fused_layer_norm.py"] = norm
    return {f"apex/{path}": source for path, source in sources.items()} | {"amp_C.py": "", "fused_layer_norm_cuda.py": ""}


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((7, 5), (5,))]


def give_gradients(params: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_adamw_steps_and_keeps_its_state_as_pytorch_does(install: Install) -> None:
    install("apex", "0.1", files())
    mine, theirs = parameters(), parameters()
    pairs = [(mine, fused_adamw(mine, **NUMBERS)), (theirs, torch.optim.AdamW(theirs, **NUMBERS))]
    for step in range(5):
        for params, optimizer in pairs:
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        states = [optimizer.state[p] for p, (_, optimizer) in zip((a, b), pairs, strict=True)]
        assert states[0].keys() == states[1].keys() == {"exp_avg", "exp_avg_sq", "step"}
        for kind in states[1]:
            torch.testing.assert_close(states[0][kind], states[1][kind], rtol=1e-12, atol=1e-14)


def test_adamw_goes_on_from_the_state_of_pytorchs(install: Install) -> None:
    """Steps come from the parameters. With the count of the group alone, which begins anew, the biases would be corrected twice."""
    install("apex", "0.1", files())
    theirs = parameters()
    reference = torch.optim.AdamW(theirs, **NUMBERS)
    for step in range(3):
        give_gradients(theirs, step)
        reference.step()
    results = []
    for steps in (3.0, 0.0):
        mine = [p.detach().clone().requires_grad_() for p in theirs]
        optimizer = fused_adamw(mine, **NUMBERS)
        for p, q in zip(mine, theirs, strict=True):
            optimizer.state[p] = {kind: x.clone() for kind, x in reference.state[q].items()} | {"step": torch.tensor(steps)}
        give_gradients(mine, 3)
        optimizer.step()
        results.append(mine)
    give_gradients(theirs, 3)
    reference.step()
    for right, wrong, expected in zip(*results, theirs, strict=True):
        torch.testing.assert_close(right, expected, rtol=1e-12, atol=1e-14)
        assert (wrong - expected).abs().max() > 1e-3


def test_adamw_refuses_groups_whose_parameters_took_different_steps(install: Install) -> None:
    install("apex", "0.1", files())
    params = parameters()
    optimizer = fused_adamw(params, **NUMBERS)
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1 and params[1] not in optimizer.state
    give_gradients(params, 1)
    with pytest.raises(ConfigError, match=r"have taken \[0, 1\] steps; accepted: equally many"):
        optimizer.step()


def test_rms_norm_has_the_arguments_and_the_result_of_the_definition(install: Install) -> None:
    install("apex", "0.1", files())
    x, weight = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.5), expected, rtol=1e-12, atol=1e-14)
    assert sys.modules["apex.normalization.fused_layer_norm"].calls == [((6,), 0.5)]


def test_what_is_served_and_where(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("apex", "0.1", files())
    assert apex.status(CPU).services == dict.fromkeys(("AdamW", "RMSNorm"), "needs a CUDA device, not cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    report = apex.status(CUDA)
    assert (report.name, report.version, report.services) == ("apex", "0.1", {"AdamW": None, "RMSNorm": None})


def test_the_other_project_of_that_name_is_recognised_and_not_imported(install: Install) -> None:
    install("apex", "0.9.10.dev0", {"apex/__init__.py": "raise ImportError('pyramid')", "apex/models.py": "", "apex/views.py": ""})
    reason = "installed is another project of that name"
    assert all(reason in (obstacle or "") for obstacle in apex.status(CPU).services.values())
    with pytest.raises(ConfigError, match=reason):
        fused_adamw(parameters(), **NUMBERS)
    with pytest.raises(ConfigError, match=reason):
        rms_norm(torch.ones(2), torch.ones(2), 1e-6)
    assert "apex" not in sys.modules


def test_without_its_extensions_it_is_refused(install: Install) -> None:
    sources = files()
    del sources["amp_C.py"]
    install("apex", "0.1", sources)
    with pytest.raises(ConfigError, match="needs apex built with its CUDA extensions; there is no amp_C"):
        fused_adamw(parameters(), **NUMBERS)
    assert apex.obstacle(apex.NORM) is None


@pytest.mark.parametrize(
    ("sources", "module", "reason"),
    [
        (files(optimizers=OPTIMIZERS.replace("adam_w_mode", "decoupled")), "apex.optimizers", "unexpected keyword argument 'adam_w_mode'"),
        (files(optimizers=OPTIMIZERS.replace("FusedAdam", "Adam")), "apex.optimizers", "apex.optimizers.FusedAdam is not there"),
        (files(norm=NORM.replace("weight, norm", "weight, bias, norm", 1)), apex.NORM, "missing a required argument: 'bias'"),
    ],
)
def test_a_package_that_differs_is_refused_with_what_differs(install: Install, sources: dict[str, str], module: str, reason: str) -> None:
    install("apex", "0.1", sources)
    obstacle = apex.obstacle(module) or ""
    assert obstacle.startswith("needs the package apex, which differs from NVIDIA apex 0.1, for which this adapter is written")
    assert reason in obstacle


def test_a_missing_package_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "present", lambda _: False)
    assert apex.obstacle("apex.optimizers") == "needs the package apex of NVIDIA, which is not installed"


def test_the_rule_of_a_run_is_its_own_where_options_say_so(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("apex", "0.1", files())
    options = OptimizerOptions(adamw="apex", lr=0.01)
    make = build_rules(options, {}, single().group, head_dim=8)["adamw"].make
    with pytest.raises(ConfigError, match="optimizer.adamw: 'apex'; accepted here: torch, because AdamW by apex needs a CUDA device"):
        make([("weight", torch.zeros(3, 3))])
    monkeypatch.setattr(apex, "gpu_obstacle", lambda *_: None)
    optimizer = make([("weight", torch.zeros(3, 3)), ("norm", torch.zeros(3))])
    assert type(optimizer).__name__ == "FusedAdam" and [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert OptimizerOptions().adamw == "torch"
    with pytest.raises(ConfigError, match="adamw: 'apex'; accepted: torch with ZeRO"):
        OptimizerOptions(adamw="apex", sharding="zero1")
