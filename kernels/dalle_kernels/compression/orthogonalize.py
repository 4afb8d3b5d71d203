"""Orthonormal columns by Householder reflections, for a batch of tall matrices (Appendix E.2, step 5).

Gram-Schmidt was unstable for the authors, so this is Householder throughout: on a CPU LAPACK's, on a GPU our own,
which treats all matrices of a batch at once, where the solvers of a GPU take them one after the other. Both are
deterministic and make the same columns up to rounding (and, for a square matrix, up to the sign of the last one).

Our own works on panels of columns. A reflection is I - w w^T with |w|^2 = 2 (or w = 0, for a column that is zero from
here on down); those of a panel, W = [w_1 ... w_b], make one matrix I - W T W^T, where the inverse of T is the upper
triangle of W^T W with ones on its diagonal. So all but the panel itself is matrix products.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Appendix E.2: keeps a matrix of zeros, or one of too low a rank, from leaving columns without a direction.
EPSILON = 1e-6
# Columns that are reflected one by one before the rest follows in three products.
PANEL = 16
# What makes the vectors w [n, rows, columns] of a panel of that shape, which it may overwrite.
Reflect = Callable[[Tensor], Tensor]


def orthogonalize(matrices: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Matrices [n, rows, columns] of float32 or float64, columns <= rows, -> orthonormal columns, of the same shape.

    They span what the columns of P + epsilon I span, after P is divided by a power of two that brings its largest entry
    to between 1/2 and 1: the result does not depend on the scale of the gradient, and no square under- or overflows.
    Each matrix has a scale and a factorisation of its own. Finite for all finite input, zeros included.
    """
    assert matrices.shape[-1] <= matrices.shape[-2], f"{tuple(matrices.shape)} is wider than tall"
    peak = torch.linalg.vector_norm(matrices, math.inf, dim=(-2, -1), keepdim=True)  # [n, 1, 1]
    _, exponent = torch.frexp(peak)
    # In two steps: the power itself may be too large for the dtype where the entries are subnormal.
    half, one = exponent // 2, torch.ones_like(peak)
    scaled = (matrices * torch.ldexp(one, -half)).mul_(torch.ldexp(one, half - exponent))
    scaled.diagonal(dim1=-2, dim2=-1).add_(epsilon)
    return householder(scaled, *_panels_for(scaled)) if matrices.is_cuda else lapack(scaled)


def lapack(matrices: Tensor) -> Tensor:
    """The factor Q of QR, [n, rows, columns]: by Householder reflections too, one matrix after the other."""
    return torch.linalg.qr(matrices)[0]  # type: ignore[no-any-return]


def householder(matrices: Tensor, width: int = PANEL, reflect: Reflect | None = None) -> Tensor:
    """The factor Q of QR, [n, rows, columns], by reflections in panels; also for float64, and any finite input.

    `width` columns are reflected one by one, by `reflect`: by torch, in some twenty operations a column, or otherwise.
    """
    n, rows, columns = matrices.shape
    rest = matrices.clone()
    panels = []
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        W = (reflect or reflect_panel)(rest[:, start:, start:stop])  # [n, rows - start, stop - start]
        T = _triangle(W)
        if stop < columns:
            right = rest[:, start:, stop:]
            right -= W @ (T.mT @ (W.mT @ right))
        panels.append((start, W, T))
    q = torch.eye(rows, columns, dtype=rest.dtype, device=rest.device).repeat(n, 1, 1)
    for start, W, T in reversed(panels):
        # Columns before `start` are still those of the identity, and zero from that row on.
        corner = q[:, start:, start:]
        corner -= W @ (T @ (W.mT @ corner))
    return q


def _panels_for(matrices: Tensor) -> tuple[int, Reflect | None]:
    """How the panels of matrices on a GPU are reflected: in one kernel where that takes them, else by torch."""
    from dalle_kernels.compression.panel_kernels import MOST_ROWS, WIDTH, reflect_panel_on_gpu

    if matrices.dtype != torch.float32 or matrices.shape[-2] > MOST_ROWS:
        return PANEL, None
    return WIDTH, lambda panel: reflect_panel_on_gpu(panel, norm_floor(panel.dtype))


def norm_floor(dtype: torch.dtype) -> float:
    """The norm up to which squares are too small to make a norm of: such a column counts as zero."""
    return math.sqrt(torch.finfo(dtype).tiny / torch.finfo(dtype).eps)


def reflect_panel(panel: Tensor) -> Tensor:
    """Reflects the panel's columns one by one, in place -> the vectors w, [n, rows, columns], zero above their row."""
    W = torch.zeros_like(panel)
    floor = norm_floor(panel.dtype)
    for i in range(panel.shape[-1]):
        x = panel[:, i:, i]  # [n, rows - i]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [n, 1]
        w = torch.where(norm > floor, x / norm, 0)
        first = w[:, :1]
        scale = (1 + first.abs()).rsqrt() * (norm > floor)
        first += torch.where(first < 0, -1.0, 1.0)
        w *= scale
        W[:, i:, i] = w
        if i + 1 < panel.shape[-1]:
            rest = panel[:, i:, i + 1 :]
            rest.baddbmm_(w[:, :, None], w[:, None, :] @ rest, alpha=-1)
    return W


def _triangle(W: Tensor) -> Tensor:
    """T [n, b, b] of the panel's product I - W T W^T."""
    inverse = (W.mT @ W).triu(1)
    inverse.diagonal(dim1=-2, dim2=-1).add_(1)
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device).expand_as(inverse)
    return torch.linalg.solve_triangular(inverse, identity, upper=True)  # type: ignore[no-any-return]
