import torch

from megatron_ext.optim import AdamW
from megatron_ext.optim.adamw import decay_groups


def run(optimizer_class: type[torch.optim.Optimizer], **options: object) -> torch.Tensor:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, 4))
    optimizer = optimizer_class([parameter], **options)
    for _ in range(5):
        optimizer.zero_grad()
        parameter.pow(3).sum().backward()
        optimizer.step()
    return parameter.detach()


def test_is_torch_adamw_with_the_defaults_of_language_models() -> None:
    defaults = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    assert torch.equal(run(AdamW), run(torch.optim.AdamW, **defaults))
    assert not torch.equal(run(AdamW), run(torch.optim.AdamW, fused=True, lr=3e-4)), "betas and decay differ from torch's defaults"


def test_arguments_are_passed_on() -> None:
    options = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.0, "fused": False, "amsgrad": True}
    assert torch.equal(run(AdamW, **options), run(torch.optim.AdamW, **options))


def test_follows_algorithm_2_of_the_paper() -> None:
    weight, gradient, lr, (beta1, beta2), eps, decay = 2.0, 0.5, 0.1, (0.9, 0.95), 1e-8, 0.2
    parameter = torch.nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = AdamW([parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    first = second = 0.0
    for step in (1, 2, 3):
        parameter.grad = torch.tensor([gradient * step], dtype=torch.float64)
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient * step
        second = beta2 * second + (1 - beta2) * (gradient * step) ** 2
        weight -= lr * ((first / (1 - beta1**step)) / ((second / (1 - beta2**step)) ** 0.5 + eps) + decay * weight)
    torch.testing.assert_close(parameter.detach(), torch.tensor([weight], dtype=torch.float64), rtol=1e-12, atol=0)


def test_only_matrices_are_decayed() -> None:
    tensors = {"matrix": torch.zeros(2, 2), "norm": torch.zeros(2), "scale": torch.zeros(()), "stack": torch.zeros(2, 2, 2)}
    matrices, vectors = decay_groups(tensors.items(), 0.3)
    assert (matrices["weight_decay"], [id(t) for t in matrices["params"]]) == (0.3, [id(tensors["matrix"]), id(tensors["stack"])])
    assert (vectors["weight_decay"], [id(t) for t in vectors["params"]]) == (0.0, [id(tensors["norm"]), id(tensors["scale"])])
    assert len(decay_groups([("matrix", tensors["matrix"])], 0.3)) == 1, "torch refuses an empty group"
