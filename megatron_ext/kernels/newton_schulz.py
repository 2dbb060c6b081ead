"""Newton-Schulz orthogonalization: U V^T of a matrix U S V^T, nearly, from matrix products alone.

Odd polynomials p(x) = a x + b x^3 + c x^5, applied one after another, drive the singular values of a normalized matrix towards 1.
``polynomial`` is the definition. ``method`` is the order of the products, ``backend`` is what computes them.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError

Polynomial = tuple[float, float, float]
Symmetric = Callable[..., Tensor]
"""``symmetric(X, Y, C=None, alpha=1.0, beta=0.0)``: alpha X Y + beta C of matrices or stacks of them, where X Y and C are symmetric."""

JORDAN = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: dict[str, tuple[Polynomial, ...]] = {
    # Jordan et al. 2024, kellerjordan.github.io/posts/muon: the steepest at 0, repeated; values end between 0.68 and 1.13.
    "jordan": (JORDAN,),
    # You 2024 (@YouJiacheng), one polynomial a step; "quintic" of Megatron-LM. Values from 0.01 end between 0.97 and 1.04.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express (Amsel et al. 2025, arXiv:2505.16932, algorithm 1) for 5 steps with a safety factor of 1.02, as modded-nanogpt and
    # dion publish them: the best of all for small singular values.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # DeepSeek-V4: eight of Jordan's, then two of a polynomial whose fixed point 1 attracts quadratically.
    "deepseek_v4": (JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
SAFETY = {"polar_express": 1.02}
"""By how much the norm is taken larger, so that rounding leaves no singular value outside [0, 1], where the polynomials were fitted."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METHODS = ("auto", "standard", "gram")


def newton_schulz(
    G: Tensor,
    steps: int | None = None,
    coefficients: str | Sequence[Polynomial] | Polynomial = "polar_express",
    method: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-20,
    backend: str | None = None,
) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    A result does not depend on the scale of its matrix, from the smallest to the largest floating-point numbers; zeros stay zeros, and
    a matrix with an infinity or NaN becomes NaN. ``jordan`` with ``standard`` in bfloat16 computes bit for bit what torch.optim.Muon does.

    Args:
        G: [..., m, n], floating point; matrices of the leading dimensions are computed together.
        steps: number of polynomials; None: 5, and 10 for ``deepseek_v4``. Sets other than ``jordan`` have as many as they were made for.
        coefficients: a key of ``COEFFICIENTS``, one (a, b, c) for all steps, or one for each step.
        method: ``standard``, ``gram`` (Gram Newton-Schulz: Zhang, Amsel, Chen and Dao 2026, dao-lab.ai/blog/2026/gram-newton-schulz; equal
            in exact arithmetic) or ``auto``: gram if one side is at least twice the other, except in bfloat16, whose 8 bits are few for
            squares of singular values.
        dtype: of the products and the result; None: that of ``G``. One of float64, float32, bfloat16, float16.
        eps: a smaller Frobenius norm counts as this.
        backend: as in ``select_backend``; None means ``auto``.

    Returns:
        [..., m, n] in ``dtype``.

    Raises:
        ConfigError: an argument is none of the above, or the backend cannot run here.
    """
    polynomials = select_polynomials(coefficients, steps)
    dtype = dtype or G.dtype
    if G.ndim < 2 or dtype not in DTYPES:
        raise ConfigError(f"newton_schulz of {list(G.shape)} in {dtype}; accepted are [..., m, n] in {', '.join(map(str, DTYPES))}")
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; accepted are {', '.join(METHODS)}")
    symmetric = BACKENDS[select_backend(backend or "auto", G.device, dtype)[0]]
    if not G.numel():
        return G.to(dtype)
    X = _normalized(G, dtype, eps, _safety(coefficients))
    # Products of single matrices are those of torch.optim.Muon, so X has no dimension of size 1 before the matrix.
    X = X.reshape(-1, *X.shape[-2:]).squeeze(0) if X.ndim > 2 else X
    transposed = X.shape[-2] > X.shape[-1]
    X = X.mT if transposed else X
    pays = X.shape[-1] >= 2 * X.shape[-2] and dtype != torch.bfloat16
    iterate = _gram if method == "gram" or (method == "auto" and pays) else _standard
    if X.ndim > 2 and X.device.type == "cpu":
        # One after another, which is as fast, and bits do not depend on what a matrix is computed together with.
        X = torch.stack([iterate(x, polynomials, symmetric) for x in X])
    else:
        X = iterate(X, polynomials, symmetric)
    return (X.mT if transposed else X).reshape(G.shape)


def polynomial(G: Tensor, steps: int | None = None, coefficients: str | Sequence[Polynomial] | Polynomial = "polar_express") -> Tensor:
    """The definition of ``newton_schulz``: U p(S / |S|) V^T in float64, by singular value decomposition. Zeros stay zeros."""
    U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
    norm = torch.linalg.vector_norm(S, dim=-1, keepdim=True) * _safety(coefficients)
    S = S / norm.masked_fill(norm == 0, 1.0)
    for a, b, c in select_polynomials(coefficients, steps):
        S = a * S + b * S**3 + c * S**5
    return (U * S[..., None, :]) @ V


def select_polynomials(coefficients: str | Sequence[Polynomial] | Polynomial, steps: int | None) -> tuple[Polynomial, ...]:
    """The polynomials (a, b, c) in order of use. Raises ConfigError for an unknown name and for a set of another number than ``steps``."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ConfigError(f"coefficients are {coefficients!r}; accepted are {', '.join(COEFFICIENTS)}, (a, b, c), or a list of those")
        chosen = COEFFICIENTS[coefficients]
    else:
        single = len(coefficients) == 3 and not any(isinstance(value, Sequence) for value in coefficients)
        chosen = (tuple(coefficients),) if single else tuple(coefficients)
        if not chosen or any(not isinstance(each, Sequence) or len(each) != 3 for each in chosen):
            raise ConfigError(f"coefficients are {coefficients!r}; accepted are (a, b, c), or a list of those")
    if steps is not None and steps < 1:
        raise ConfigError(f"Newton-Schulz steps are {steps}; accepted is 1 or more")
    if len(chosen) == 1:
        return chosen * (5 if steps is None else steps)
    if steps not in (None, len(chosen)):
        raise ConfigError(f"Newton-Schulz steps are {steps}, but coefficients {coefficients!r} are {len(chosen)} polynomials, one a step")
    return chosen


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that runs when ``name`` is asked for on ``device`` in ``dtype``, and why.

    ``auto`` is ``triton`` on CUDA where it can run, and ``blas`` elsewhere. Raises ConfigError for an unknown backend and for one that
    cannot run.
    """
    obstacle = _triton_obstacle(device, dtype)
    if name == "auto":
        if device.type != "cuda":
            return "blas", f"auto: on {device.type}"
        return ("triton", "auto: half of each symmetric product") if obstacle is None else ("blas", f"auto: triton {obstacle}")
    if name not in BACKENDS:
        raise ConfigError(f"newton_schulz backend is {name!r}; accepted are auto, {', '.join(BACKENDS)}")
    if name == "triton" and obstacle is not None:
        raise ConfigError(f"newton_schulz backend is 'triton', which {obstacle}; able to run here: blas")
    return name, "as asked for"


def _safety(coefficients: object) -> float:
    return SAFETY.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0


def _normalized(G: Tensor, dtype: torch.dtype, eps: float, safety: float) -> Tensor:
    """``G`` in ``dtype``, each matrix divided by ``safety`` times its Frobenius norm (summed in float32 at least, rounded to ``dtype``)."""
    wide = torch.promote_types(G.dtype, torch.float32)
    # Powers of two change no digit, and bring the squares of very large and very small numbers into range.
    exponent = torch.frexp(G.abs().amax((-2, -1), keepdim=True).to(wide)).exponent.clamp(-126, 126)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=wide), -exponent)
    X = (G * scale).to(dtype)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    norm = torch.maximum(norm, (torch.full_like(norm, eps) * scale).to(dtype))
    return X / (norm * safety).masked_fill(norm == 0, 1.0)


def _standard(X: Tensor, polynomials: Sequence[Polynomial], symmetric: Symmetric) -> Tensor:
    """X <- (a I + b A + c A^2) X with A = X X^T, for X of at least as many columns as rows."""
    for a, b, c in polynomials:
        A = symmetric(X, X.mT)
        X = _add_product(X, symmetric(A, A, A, alpha=c, beta=b), X, beta=a)
    return X


def _gram(X: Tensor, polynomials: Sequence[Polynomial], symmetric: Symmetric) -> Tensor:
    """The same on R = X X^T only: the product Q of all factors a I + b R + c R^2 is multiplied with X at the end.

    Rounding makes R slightly indefinite, which the polynomials amplify; so Q is applied and R computed anew after step 2 (as published)
    and after every third one from there, in bfloat16 every second one: with three, ten steps overflow.
    """
    length = 2 if X.dtype == torch.bfloat16 else 3
    for start, stop in [(0, 2), *((begin, begin + length) for begin in range(2, len(polynomials), length))]:
        R, Q = symmetric(X, X.mT), None
        segment = polynomials[start:stop]
        for step, (a, b, c) in enumerate(segment):
            Z = symmetric(R, R, R, alpha=c, beta=b)
            if step < len(segment) - 1:
                R = symmetric(R, Z, R, beta=a)
                R = symmetric(R, Z, R, beta=a)
            if Q is None:
                Z.diagonal(dim1=-2, dim2=-1).add_(a)
                Q = Z
            else:
                Q = symmetric(Q, Z, Q, beta=a)
        X = Q @ X
    return X


def _add_product(C: Tensor, X: Tensor, Y: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha X Y + beta C."""
    add = torch.addmm if X.ndim == 2 else torch.baddbmm
    return add(C, X, Y, alpha=alpha, beta=beta)


def _blas(X: Tensor, Y: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return X @ Y if C is None else _add_product(C, X, Y, alpha, beta)


def _triton(X: Tensor, Y: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    return _twin().symmetric_product(X, Y, C, alpha, beta)


BACKENDS: dict[str, Symmetric] = {"blas": _blas, "triton": _triton}


@cache
def _twin() -> object:
    # Not at the top: it needs Triton.
    return importlib.import_module("megatron_ext.csrc.triton.newton_schulz")


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run, or None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"needs a CUDA device, not {device.type}, or Triton's interpreter (TRITON_INTERPRET=1)"
    if dtype == torch.bfloat16 and interpreted:
        return "needs float32 or float16 in Triton's interpreter, which multiplies bfloat16 as if it were integers"
    if dtype == torch.float64:
        return "needs float32, bfloat16 or float16, not float64"
    if not _importable("triton"):
        return "needs the package triton, which cannot be imported"
    return None


@cache
def _importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
