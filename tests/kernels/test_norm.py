"""RMSNorm and SSNorm: the errors of PyTorch's and transformers' own code against float64, and bits that depend on nothing but the input."""

import ctypes
import importlib
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.kernels import build, native
from megatron_ext.kernels.norm import rms_norm, select_backend, ss_norm
from tests.kernels.triton_programs import compiled, run_program

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
Norm = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]


def runs_here(backend: str) -> bool:
    try:
        rms_norm(torch.ones(1, 1), torch.ones(1), backend=backend)
    except ConfigError:
        return False
    return True


COMPILED = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here(name), reason=f"{name}: this machine cannot run it"))
    for name in ("cpu-portable", "cpu-avx2", "cpu-avx512")
]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ours(backend: str, threads: int | None = None) -> Norm:
    def norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        result = rms_norm(x, weight, EPS, residual=residual, backend=backend, threads=threads)
        return (result,) if residual is None else result

    return norm


def pytorchs(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    total, shape = x if residual is None else x + residual, x.shape[-1:]
    y = F.rms_norm(total, shape, weight, EPS) if weight.numel() > 1 else F.rms_norm(total, shape, None, EPS) * weight
    return (y,) if residual is None else (y, total)


def transformers(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
    """Rounds what is normalized before the weight is applied."""
    total = x if residual is None else x + residual
    # Not at the top: it takes seconds, which the programs below need not wait for.
    module = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm(len(weight), EPS)
    y = torch.func.functional_call(module, {"weight": weight}, (total,))
    return (y,) if residual is None else (y, total)


def outputs(norm: Norm, inputs: list[Tensor | None], grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The results and all gradients."""
    leaves = [None if each is None else each.to(dtype).requires_grad_() for each in inputs]
    results = norm(*leaves)
    wanted = [each for each in leaves if each is not None]
    gradients = torch.autograd.grad(results, wanted, [grad.to(dtype) for grad in grads[: len(results)]])
    return [*(each.detach() for each in results), *gradients]


def case(rows: int, width: int, one_gain: bool, with_residual: bool, dtype: torch.dtype, seed: int) -> tuple[list, list[Tensor]]:
    """x, weight and residual; gradients of y and of x + residual."""
    x, residual, *grads = (random(rows, width, seed=4 * seed + i, dtype=dtype) for i in range(4))
    weight = random(1 if one_gain else width, seed=1000 + seed, dtype=dtype)
    return [3 * x + 0.5, weight, residual if with_residual else None], grads


def scales(inputs: list[Tensor | None], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradients of x [rows, 1] and of a gain: of the terms that they are sums of, which may cancel."""
    x, weight, residual = (None if each is None else each.double() for each in inputs)
    total = x if residual is None else x + residual
    inverse = (total.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return inverse * (grad.double() * weight).norm(dim=-1, keepdim=True), (grad.double() * total * inverse).norm()


def errors(norms: dict[str, Norm], rows: int, width: int, one_gain: bool, with_residual: bool, dtype: torch.dtype, seeds: int) -> dict:
    """By norm: root mean squares over seeds and values of the errors of y and of the gradients of x and weight."""
    squares = {name: torch.zeros(3, dtype=torch.float64) for name in norms}
    for seed in range(seeds):
        inputs, grads = case(rows, width, one_gain, with_residual, dtype, seed)
        exact = outputs(pytorchs, inputs, grads, torch.float64)
        of_x, of_gain = scales(inputs, grads[0])
        units = [1.0, of_x, of_gain if one_gain else 1.0]
        places = [0, *((2, 3) if with_residual else (1, 2))]
        for name, norm in norms.items():
            mine = outputs(norm, inputs, grads, dtype)
            assert [each.dtype for each in mine] == [dtype] * len(exact)
            squares[name] += torch.stack(
                [((mine[i].double() - exact[i]) / unit).square().mean() for i, unit in zip(places, units, strict=True)]
            )
    return {name: (each / seeds).sqrt() for name, each in squares.items()}


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("one_gain", [False, True], ids=["rms_norm", "ss_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_at_most_those_of_pytorch(dtype: torch.dtype, one_gain: bool, with_residual: bool) -> None:
    """Also of the definition. Ratios of root mean squares of N errors vary by about 1 / sqrt(N).

    The gradient of a gain is one number, which may be right by luck: an error of one rounding of its terms passes too.
    """
    luck = torch.tensor([0.0, 0.0, torch.finfo(torch.float32).eps if one_gain else 0.0])
    norms = {"cpu": ours("cpu"), "torch": ours("torch"), "pytorch": pytorchs}
    if not one_gain:
        norms["transformers"] = transformers
    for rows, width in itertools.product((1, 3, 64), (1, 7, 257, 1024, 5120)):
        seeds = 2 if rows * width > 200_000 else 4 if rows * width > 10_000 else 12
        found = errors(norms, rows, width, one_gain, with_residual, dtype, seeds)
        counts = torch.tensor([rows * width, rows * width, 1 if one_gain else width]) * seeds
        for name in norms:
            ratios = found["cpu"] / found[name].maximum(luck)
            if name == "pytorch" and dtype == torch.bfloat16 and not one_gain:
                # With a weight, PyTorch rounds once, we round where transformers does, between the two factors.
                ratios[0] /= 2**0.5
            assert (ratios <= 1.02 + 3 / counts.sqrt()).all(), (name, rows, width, ratios)


def test_that_bound_finds_statistics_in_bfloat16() -> None:
    def careless(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        return (x * x.square().mean(-1, keepdim=True).add(EPS).rsqrt() * weight,)

    found = errors({"careless": careless, "pytorch": pytorchs}, 64, 257, False, False, torch.bfloat16, 2)
    assert (found["careless"] > 1.1 * found["pytorch"]).all()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_threads_or_instructions(backend: str, dtype: torch.dtype) -> None:
    for (rows, width), one_gain, with_residual in itertools.product(
        ((1, 1), (3, 7), (65, 33), (64, 64), (300, 257), (7, 1024)), (False, True), (False, True)
    ):
        inputs, grads = case(rows, width, one_gain, with_residual, dtype, 0)
        expected = outputs(ours("cpu", threads=1), inputs, grads, dtype)
        for threads in (1, 2, 5):
            mine = outputs(ours(backend, threads), inputs, grads, dtype)
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True)), (rows, width, one_gain, with_residual, threads)


def test_the_order_of_rows_counts() -> None:
    """So that equal bits above say something."""
    inputs, grads = case(300, 257, False, False, torch.float32, 0)
    forward = outputs(ours("cpu"), inputs, grads, torch.float32)[2]
    backward = outputs(ours("cpu"), [inputs[0].flip(0), *inputs[1:]], [grads[0].flip(0)], torch.float32)[2]
    assert not torch.equal(forward, backward)
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4)


def test_all_variants_agree_where_the_cpu_lacks_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them compiled for any CPU: the compiler makes of vectors of 16 floats what there is."""
    library = tmp_path / "norm.so"
    flags = [flag if flag != "-O3" else "-O0" for flag in build.FLAGS]
    everywhere = ["-Dtarget(x)=unused", "-D__builtin_cpu_supports(x)=1", f"-I{build.SOURCES / 'common'}"]
    subprocess.run([build.find_compiler(), *flags, *everywhere, str(build.SOURCES / "cpu" / "norm.cpp"), "-o", str(library)], check=True)
    sizes = ((65, 33), (3, 257), (2, 1024))
    variants = [(*where, dtype) for where in itertools.product(sizes, (False, True), (False, True)) for dtype in DTYPES]
    expected = [outputs(ours("cpu"), *case(*size, *ways, dtype, 0), dtype) for size, *ways, dtype in variants]
    monkeypatch.setattr(native, "load_library", lambda stem: ctypes.CDLL(str(library)))
    for name in ("cpu-avx512", "cpu-avx2", "cpu-portable"):
        for (size, *ways, dtype), bits in zip(variants, expected, strict=True):
            mine = outputs(ours(name), *case(*size, *ways, dtype, 0), dtype)
            assert all(torch.equal(a, b) for a, b in zip(mine, bits, strict=True)), (name, size, ways, dtype)


def test_ss_norm_is_pytorchs_without_weight_times_the_gain() -> None:
    for shape in ((3, 5), (2, 4, 257), (1, 1), (7, 1024)):
        x, gain = random(*shape).double() * 3 + 0.5, torch.tensor(1.7, dtype=torch.float64)
        expected = F.rms_norm(x, shape[-1:], None, EPS) * gain
        assert torch.equal(ss_norm(x, gain), expected)
        torch.testing.assert_close(ss_norm(x.float(), gain.float()).double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(ss_norm(x.bfloat16(), gain[None].bfloat16()), F.rms_norm(x.bfloat16(), shape[-1:], None, EPS) * gain.bfloat16())
        assert not torch.equal(ss_norm(x, gain, 1e-3), expected), "eps counts"
    with pytest.raises(ConfigError, match=r"gain is \[5\]; accepted is one element"):
        ss_norm(random(3, 5), torch.ones(5))


def test_rms_norm_is_pytorchs_in_float64() -> None:
    for shape in ((3, 5), (2, 4, 257), (1, 1), (0, 8)):
        x, weight, grad = random(*shape).double(), random(shape[-1], seed=1).double(), random(*shape, seed=2).double()
        mine, expected = (outputs(norm, [x, weight, None], [grad], torch.float64) for norm in (ours("auto"), pytorchs))
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_definition() -> None:
    x, residual = (random(3, 2, 4, seed=seed).double().requires_grad_() for seed in (0, 1))
    for weight in (random(4, seed=2), torch.tensor(1.5), torch.tensor([[0.7]])):
        weight = weight.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))
        assert torch.autograd.gradcheck(lambda x, weight, residual: rms_norm(x, weight, 1e-3, residual=residual), (x, weight, residual))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_each_result_and_each_input_may_be_unused(backend: str) -> None:
    x, weight, residual = random(3, 40), random(40, seed=1), random(3, 40, seed=2)
    for used, needed in itertools.product(((0, 1), (0,), (1,)), itertools.product((False, True), repeat=3)):
        gradients = []
        for norm in (ours(backend), pytorchs):
            leaves = [each.clone().requires_grad_(need) for each, need in zip((x, weight, residual), needed, strict=True)]
            results = norm(*leaves)
            total = sum((results[i] * (i + 1) * torch.arange(40)).sum() for i in used)
            if total.requires_grad:
                total.backward()
            gradients.append([leaf.grad for leaf in leaves])
        for mine, expected in zip(*gradients, strict=True):
            assert mine is None or mine.shape == expected.shape
            mine, expected = (torch.zeros(()) if each is None else each for each in (mine, expected))
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    wide = random(6, 4, 100, dtype=dtype)
    for x in (wide[..., 30:70], wide[:, 1, 3:50], wide.transpose(0, 2), wide[::2, 0], wide[:1].expand(5, 4, 100), wide[0, 0, ::3]):
        weight, residual = random(x.shape[-1], seed=1, dtype=dtype), random(*x.shape, seed=2, dtype=dtype)
        for inputs in ([x, weight, None], [x, weight[:1], residual], [residual, weight, x]):
            grad = random(*x.shape[:-1], 2 * x.shape[-1], seed=3, dtype=dtype)[..., 1 : x.shape[-1] + 1]
            mine = outputs(ours(backend), inputs, [grad, torch.ones((), dtype=dtype).expand(x.shape)], dtype)
            inputs = [None if each is None else each.contiguous() for each in inputs]
            expected = outputs(ours(backend), inputs, [grad.contiguous(), torch.ones(x.shape, dtype=dtype)], dtype)
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True)), x.stride()


def test_types_of_weights_and_few_rows() -> None:
    x, weight = random(5, 48, dtype=torch.bfloat16), random(48, seed=1).requires_grad_()
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert torch.equal(y, rms_norm(x, weight, backend="torch"))
    for backend in ("cpu", "torch"):
        x, weight = random(0, 3, 8).requires_grad_(), random(8).requires_grad_()
        y, total = rms_norm(x, weight, residual=random(0, 3, 8), backend=backend)
        y.sum().backward()
        assert y.shape == total.shape == x.grad.shape == (0, 3, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_special_values_stay_in_their_row() -> None:
    for backend, dtype in itertools.product(("cpu", "torch"), DTYPES):
        x = random(4, 40, dtype=dtype)
        x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
        x.requires_grad_()
        y = rms_norm(x, torch.ones(40, dtype=dtype), backend=backend)
        y.backward(torch.ones_like(y))
        assert (y[0] == 0).all() and x.grad[0].isfinite().all(), backend
        assert y[1].isnan().all() and y[2, 5].isnan() and (y[2, :5] == 0).all()
        assert torch.equal(y[3], rms_norm(x[3].detach(), torch.ones(40, dtype=dtype), backend=backend))


def test_compiles_as_one_graph() -> None:
    def loss(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y, total = rms_norm(x, weight, residual=residual)
        return (y * total).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [random(*shape, seed=7).requires_grad_() for shape in ((5, 24), (24,), (5, 24))]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_backend_is_chosen_by_visible_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("megatron_ext.kernels.norm")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel, "_importable", lambda package: True)
    assert select_backend("auto", cpu, torch.bfloat16, torch.float32) == ("cpu", "auto: on cpu")
    assert select_backend("auto", cuda, torch.bfloat16) == ("triton", "auto: on cuda")
    assert select_backend("torch", cpu, torch.float64) == ("torch", "as asked for")
    assert select_backend("auto", torch.device("meta"), torch.float32)[0] == "torch"
    for device in (cpu, cuda):
        name, why = select_backend("auto", device, torch.float64)
        assert name == "torch" and "not torch.float64" in why
    for name, device, message in (
        ("triton", cpu, "needs a CUDA device, not cpu.*able to run here: torch, cpu$"),
        ("cpu", cuda, "tensors on cpu, not on cuda.*torch, triton$"),
        ("cuda", cuda, "accepted are auto, torch, cpu, cpu-avx512, cpu-avx2, cpu-portable, triton"),
    ):
        with pytest.raises(ConfigError, match=message):
            select_backend(name, device, torch.float32)
    monkeypatch.setattr(kernel, "_importable", lambda package: False)
    name, why = select_backend("auto", cuda, torch.float32)
    assert name == "torch" and "triton needs the package triton" in why


def test_errors_say_what_is_accepted() -> None:
    x, weight = random(3, 8), random(8)
    for arguments, options, message in (
        ((torch.tensor(1.0), weight), {}, r"norm of \[\] .*accepted are \[..., n\]"),
        ((x[:, :0], weight[:0]), {}, "n of 1 or more"),
        ((x.long(), weight), {}, "floating-point"),
        ((x, weight[:4]), {}, r"weight \[4\]; accepted are \[8\] and one element"),
        ((x, weight), {"residual": x[:2]}, r"residual \[2, 8\]"),
        ((x, weight), {"residual": x.bfloat16()}, "in torch.bfloat16; they have to agree"),
        ((x, weight.double()), {"backend": "cpu"}, "not torch.float32, torch.float64; able to run here: torch"),
    ):
        with pytest.raises(ConfigError, match=message):
            rms_norm(*arguments, **options)


def triton_in_the_interpreter() -> None:
    """As near to float64 as the definition: rows of several tiles, of several programs, shorter and longer than powers of two."""
    norms = {"triton": ours("triton"), "torch": ours("torch")}
    for (rows, width, with_residual), one_gain, dtype in itertools.product(((70, 33, False), (3, 257, True)), (False, True), DTYPES):
        found = errors(norms, rows, width, one_gain, with_residual, dtype, 2)
        counts = torch.tensor([rows * width, rows * width, 1 if one_gain else width]) * 2
        assert (found["triton"] <= found["torch"] * (1.05 + 3 / counts.sqrt())).all(), (rows, width, one_gain, with_residual, dtype, found)
    module = importlib.import_module("megatron_ext.csrc.triton.norm")
    module.PROGRAMS = 3
    wide = random(140, 80, seed=5)
    for width in (70, 1):
        inputs, grads = [wide[:, 3 : 3 + width], random(width, seed=6), None], [random(140, 75)[:, :width]]
        for mine, expected in zip(*(outputs(norm, inputs, grads, torch.float32) for norm in norms.values()), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert outputs(norms["triton"], [wide[:0], random(80), None], [wide[:0]], torch.float32)[2].tolist() == [0.0] * 80
    x = torch.full((2, 40), torch.nan, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(1), backend="triton").isnan().all()
    with pytest.raises(ConfigError, match="rows of 65537; accepted are up to 65536"):
        rms_norm(random(1, 65537), torch.ones(1), backend="triton")


def triton_compiled() -> None:
    """For GPUs that are not here: bfloat16 is rounded by the instruction, roots and divisions are true ones."""
    module = importlib.import_module("megatron_ext.csrc.triton.norm")
    sizes = dict.fromkeys(("rows", "width", "x_stride", "residual_stride", "grad_stride", "grad_sum_stride", "tiles"), "i32")
    floats = dict.fromkeys(("weight", "inverse_rms", "parts"), "*fp32") | {"eps": "fp32"}
    halves = dict.fromkeys(("x", "residual", "y", "total", "grad", "grad_sum", "grad_x"), "*bf16")
    flags = {"HAS_RESIDUAL": True, "HAS_GRAD_SUM": True, "WITH_WEIGHT": True, "HEIGHT": 2, "WIDTH": 1024, "BY_BITS": False}
    kernels = (module._normalize_kernel, module._differentiate_kernel)
    for (architecture, one_gain), kernel in itertools.product(((80, False), (90, True), (100, False)), kernels):
        types = sizes | floats | halves
        built = compiled(kernel, architecture, types, flags | {"ONE_GAIN": one_gain}, num_warps=4)
        ptx = built["ptx"]
        assert "cvt.rn.bf16" in ptx and "div.rn.f32" in ptx and "approx" not in ptx and built["cubin"], (architecture, kernel)


@pytest.mark.parametrize(
    ("program", "interpret"), [(triton_in_the_interpreter, True), (triton_compiled, False)], ids=lambda x: getattr(x, "__name__", x)
)
def test_triton_without_a_gpu(program: Callable[[], None], interpret: bool) -> None:
    run_program(program, interpret=interpret)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="triton: there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_on_a_gpu(dtype: torch.dtype) -> None:
    for (rows, width), one_gain, with_residual in itertools.product(
        ((1, 1), (3, 7), (64, 257), (5000, 1024), (700, 5120)), (False, True), (False, True)
    ):
        inputs, grads = case(rows, width, one_gain, with_residual, dtype, 0)
        there = [None if each is None else each.cuda() for each in inputs]
        mine = outputs(ours("triton"), there, [grad.cuda() for grad in grads], dtype)
        again = outputs(ours("triton"), there, [grad.cuda() for grad in grads], dtype)
        assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
        for a, b in zip(mine, outputs(ours("cpu"), inputs, grads, dtype), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3 * rows**0.5)
