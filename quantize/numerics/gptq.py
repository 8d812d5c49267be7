"""GPTQ: weights rounded one input after the other, each one's error made good by the next.

Rounding to nearest minimises ‖Ŵ − W‖. What counts is ‖X Ŵᵀ − X Wᵀ‖² over the inputs X (rows, K) of
a layer. That is a quadratic form of the error, the same for every output, a row e of W − Ŵ:

    e H eᵀ        H = Xᵀ X + λ 1, (K, K)

Columns whose inputs resemble each other make up for each other: one is rounded up, the others down
(Frantar et al., 2022; errors are there taken from column to column by the rows of the Cholesky
factor of H⁻¹). With the factor of H itself, H = Uᵀ U, the same steps read

    e H eᵀ = |U eᵀ|² = Σⱼ (Uⱼⱼ eⱼ + cⱼ)²        cⱼ = Σᵢ Uⱼᵢ eᵢ over i > j

From the last column to the first, all of cⱼ is known when column j is rounded, and the value that
makes its square smallest is

    qⱼ = cast(clip((Wⱼ + cⱼ / Uⱼⱼ) / s))        ties to even, as in ``formats``

No inverse is needed, and the sum of the squares is the error itself. With H = 1 it is rounding to
nearest. Errors reach 128 columns at once, the others a block at a time, as matrix products.

**Order.** The largest Hⱼⱼ first: its error costs most, and most columns are left to make it good.

**Scales** are those of rounding to nearest, from the weight as it was. So they can be held against
the checkpoint, and do not depend on the order. What moves out of their range saturates, and the
error of that moves on.

**Damping.** λ is a hundredth of the mean of the diagonal: what stands for inputs that calibration
did not see. Rounded inputs X̂ add s²/12 per row to the diagonal, which is less; so H is of X.

**Dead channels**, zero in every row, say nothing of their column, which is rounded to nearest.

**No output is worse** on what calibration saw: where a row's sum of squares is not below that of
rounding to nearest, which choosing column by column does not exclude, the row is left at nearest.
So is a row whose |e|² would be more than ``MAX_MOVED`` times that of rounding to nearest: inputs
not seen might ask for what it gave up, and verification counts on it.

H needs no shift, which goes into the bias exactly. Whatever else is folded into X is linear, X M:
H is made of X as the layer met it, while the block runs, and becomes Mᵀ H M; nothing is spooled.

Cost: 2 K² operations a row for H, K³ / 3 for U, which lies where H was, and 2 N K² to round and to
compare N outputs. H is float32: 41 MB at K = 3200, 655 MB at 12800.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize.numerics import formats
from internvl_edge.types import Array

DAMPING = 0.01  # of the mean of H's diagonal
MAX_MOVED = 16.0
BLOCK = 128  # columns that an error reaches at once
_ROWS = 512  # of H at once


def add_rows(products: Array, rows: Array) -> None:
    """Xᵀ X (K, K) and the same of further rows (rows, K), in place."""
    x = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    torch.from_numpy(products).addmm_(x.T, x)


def change_rows(products: Array, change: Callable[[Array], Array]) -> None:
    """Let all rows have gone through a linear map of (rows, K) to the same: Mᵀ H M, in place."""
    for half in (products, products.T):
        for start in range(0, len(half), _ROWS):
            rows = slice(start, start + _ROWS)
            half[rows] = change(np.ascontiguousarray(half[rows]))


class Factor:
    """U of a damped H, and the column of the weight that each of its columns stands for."""

    def __init__(self, products: Array, name: str) -> None:
        """Factorise Xᵀ X (K, K), whose memory becomes that of U; below U lies what was there.

        Raises:
            CalibrationError: a product is not finite; names the layer.
        """
        diagonal = products.diagonal().astype(np.float64)
        if not np.isfinite(diagonal).all():
            raise CalibrationError(
                f"{name}: expected finite products of its inputs, found NaN or infinity; inputs "
                'are beyond 1e18. The recipe\'s rounding "nearest" needs no products'
            )
        dead = diagonal <= 0
        mean = 1.0 if dead.all() else float(diagonal[~dead].mean())
        diagonal[dead] = mean
        self.columns = np.argsort(diagonal, kind="stable")  # (K,); the last is rounded first
        products[np.diag_indices_from(products)] = diagonal + DAMPING * mean
        _reorder(products, self.columns)
        self.upper = torch.from_numpy(products)
        _factorise(self.upper, DAMPING * mean)


def _reorder(products: Array, columns: Array) -> None:
    for half in (products, products.T):
        for start in range(0, len(half), _ROWS):
            rows = slice(start, start + _ROWS)
            half[rows] = half[rows][:, columns]


def _factorise(h: Tensor, damping: float) -> None:
    """Make U of H in its upper blocks, a block of rows after the other, all in place."""
    for start, end in _spans(len(h)):
        rows = h[start:end, start:]
        rows -= h[:start, start:end].T @ h[:start, start:]
        lower = _cholesky(rows[:, : end - start].double(), damping).float()
        rows[:] = torch.linalg.solve_triangular(lower, rows, upper=False)
        rows[:, : end - start] = lower.T


def _cholesky(h: Tensor, damping: float) -> Tensor:
    """L of H = L Lᵀ. No pivot is below the damping but by rounding, for which more is added.

    Raises:
        CalibrationError: H is not finite.
    """
    if not bool(h.isfinite().all()):
        raise CalibrationError(
            "GPTQ: expected finite products of a layer's inputs, found NaN or infinity; the "
            'recipe\'s rounding "nearest" needs none'
        )
    more = 0.0
    while True:
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(h)
        if not int(info) and float(lower.diagonal().min()) ** 2 > damping / 2:
            return lower
        more = 2 * more or damping
        h = h + more * torch.eye(len(h), dtype=h.dtype)


def _spans(columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def improved(
    weight: Array, nearest: Array, scales: Array, fmt: formats.Format | str, factor: Factor
) -> Array:
    """Values of a weight that leave less error in the output than rounding to nearest does.

    Args:
        weight: (N, K), finite.
        nearest: its values, rounded to nearest, (N, K).
        scales: of an output (N,), or of an output and a block of inputs (N, blocks).
        fmt: of the values.
        factor: of the layer's inputs.

    Returns:
        As ``nearest``; outputs that would not be better are the same.
    """
    upper, count = factor.upper, weight.shape[1]
    table = np.ascontiguousarray(scales.reshape(len(scales), -1).T)  # (blocks, N)
    error, found = torch.empty(weight.shape[::-1]), np.empty_like(nearest)  # (K, N), (N, K)
    usual, least, near = torch.zeros((3, len(weight)), dtype=torch.float64)  # errors of rows
    spans = [(start, end, factor.columns[start:end]) for start, end in reversed(_spans(count))]
    for start, end, here in spans:
        rounded = nearest[:, here].T.astype(np.float32) * table[here // (count // len(table))]
        error[start:end] = torch.from_numpy(weight[:, here].T - rounded)
        usual += (upper[start:end, start:] @ error[start:]).square().sum(dim=0)
        near += error[start:end].square().sum(dim=0)
    for start, end, here in spans:
        carried = upper[start:end, end:] @ error[end:]  # c, from columns behind the span
        inner = upper[start:end, start:end].T.contiguous()
        w = np.array(weight[:, here].T, np.float32, order="C")
        own = table[here // (count // len(table))]
        found[:, here] = _round(w, own, fmt, inner, carried, error[start:end]).T
        least += carried.square().sum(dim=0)
    is_better = (least < usual) & (error.square().sum(dim=0) <= MAX_MOVED * near)
    return np.where(is_better.numpy()[:, None], found, nearest)


def _round(
    w: Array,
    scales: Array,
    fmt: formats.Format | str,
    inner: Tensor,
    carried: Tensor,
    error: Tensor,
) -> Array:
    """Values of a span of columns (columns, N), from its last; ``inner`` is its part of Uᵀ.

    Fills ``error``, and adds to ``carried``, which is c, what becomes the terms U e + c.
    """
    c, values = carried.numpy(), np.empty(w.shape, formats.as_format(fmt).dtype)
    for j in reversed(range(len(w))):
        wanted = w[j] + c[j] / np.float32(inner[j, j])
        values[j] = formats.quantize(wanted, scales[j], fmt, 0)
        error[j] = torch.from_numpy(w[j] - values[j].astype(np.float32) * scales[j])
        carried[: j + 1].addr_(inner[j, : j + 1], error[j])
    return values
