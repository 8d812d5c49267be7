"""GPTQ: weights are rounded column by column, and each error is compensated by the next columns.

Rounding to nearest minimises ‖Ŵ − W‖. What counts is ‖X Ŵᵀ − X Wᵀ‖² over the inputs X (rows, K) of
a layer. That is a quadratic form, the same for every output, of the output's error e, a row of
W − Ŵ:

    e H eᵀ        H = Xᵀ X + λ 1, (K, K)

Columns with similar inputs compensate each other: one is rounded up, the others down (Frantar et
al., 2022, who propagate errors from column to column with the rows of the Cholesky factor of H⁻¹).
With the factor of H itself, H = Uᵀ U, the same steps are

    e H eᵀ = |U eᵀ|² = Σⱼ (Uⱼⱼ eⱼ + cⱼ)²        cⱼ = Σᵢ Uⱼᵢ eᵢ over i > j

Going from the last column to the first, all of cⱼ is known when column j is rounded, and the value
that makes its square smallest is

    qⱼ = cast(clip((Wⱼ + cⱼ / Uⱼⱼ) / s))        ties to even, as in ``formats``

No inverse is needed, and the sum of the squares is the error itself. With H = 1 this is rounding
to nearest. Errors are propagated at once within a span of 128 columns, and to the other columns a
span at a time, as matrix products.

**Order.** The largest Hⱼⱼ comes first: its error costs most, and most columns are left to
compensate it.

**Scales** are those of rounding to nearest, computed from the original weight. So they can be
checked against the checkpoint, and do not depend on the order. Values that move out of their range
saturate, and that error is propagated too.

**Damping.** λ is a hundredth of the mean of the diagonal; it stands for inputs that calibration
did not see. Rounded inputs X̂ would add s²/12 per row to the diagonal, which is less; so H is
computed from X, not from X̂.

**Dead channels**, zero in every row, say nothing about their column, which is rounded to nearest.

**No output gets worse** on the calibration data: choosing column by column does not guarantee that
a row's sum of squares falls below that of rounding to nearest, and where it does not, the row
stays rounded to nearest. So does a row whose |e|² would be more than ``MAX_MOVED`` times that of
rounding to nearest: inputs not seen might need the accuracy that it gave up, and verification
relies on this bound.

H needs no shift of X, which goes into the bias exactly. Everything else that is folded into X is
linear, X M: H is accumulated from X as the layer reads it while the block runs, and then becomes
Mᵀ H M; nothing is spooled.

Cost: 2 K² operations per row for H, K³ / 3 for U, which overwrites H, and 2 N K² to round and to
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
MAX_MOVED = 16.0  # most that GPTQ may grow a row's |e|² compared with rounding to nearest
BLOCK = 128  # columns of a span
_ROWS = 512  # of H at a time


def add_rows(products: Array, rows: Array) -> None:
    """Add the products of further rows (rows, K) to Xᵀ X (K, K), in place."""
    x = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    torch.from_numpy(products).addmm_(x.T, x)


def change_rows(products: Array, change: Callable[[Array], Array]) -> None:
    """Make H that of rows that went through a linear map of (rows, K): Mᵀ H M, in place."""
    for half in (products, products.T):
        for start in range(0, len(half), _ROWS):
            rows = slice(start, start + _ROWS)
            half[rows] = change(np.ascontiguousarray(half[rows]))


class Factor:
    """The factor U of a damped H, and the weight's column that each of its columns belongs to."""

    def __init__(self, products: Array, name: str) -> None:
        """Factorise Xᵀ X (K, K) in place: U overwrites it; below U's diagonal old values remain.

        Raises:
            CalibrationError: a product is not finite; names the layer.
        """
        diagonal = products.diagonal().astype(np.float64)
        if not np.isfinite(diagonal).all():
            raise CalibrationError(
                f"{name}: expected finite products of its inputs, found NaN or infinity; some "
                'inputs are beyond 1e18. The recipe\'s rounding "nearest" needs no products'
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
    """Turn H into U in its upper blocks, one block of rows after the other, all in place."""
    for start, end in _spans(len(h)):
        rows = h[start:end, start:]
        rows -= h[:start, start:end].T @ h[:start, start:]
        lower = _cholesky(rows[:, : end - start].double(), damping).float()
        rows[:] = torch.linalg.solve_triangular(lower, rows, upper=False)
        rows[:, : end - start] = lower.T


def _cholesky(h: Tensor, damping: float) -> Tensor:
    """Return L of H = L Lᵀ; only rounding can bring a pivot below the damping: then add more.

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
    """Return values of a weight that leave less error in the output than rounding to nearest.

    Args:
        weight: (N, K), finite.
        nearest: its values, rounded to nearest, (N, K).
        scales: per output (N,), or per output and block of inputs (N, blocks).
        fmt: format of the values.
        factor: of the layer's inputs.

    Returns:
        Values as in ``nearest``; outputs that would not improve are unchanged.
    """
    upper, count = factor.upper, weight.shape[1]
    table = np.ascontiguousarray(scales.reshape(len(scales), -1).T)  # (blocks, N)
    error, values = torch.empty(weight.shape[::-1]), np.empty_like(nearest)  # (K, N), (N, K)
    usual, least, near = torch.zeros((3, len(weight)), dtype=torch.float64)  # errors of rows
    spans = [(start, end, factor.columns[start:end]) for start, end in reversed(_spans(count))]
    for start, end, here in spans:
        rounded = nearest[:, here].T.astype(np.float32) * table[here // (count // len(table))]
        error[start:end] = torch.from_numpy(weight[:, here].T - rounded)
        usual += (upper[start:end, start:] @ error[start:]).square().sum(dim=0)
        near += error[start:end].square().sum(dim=0)
    for start, end, here in spans:
        carried = upper[start:end, end:] @ error[end:]  # c, from the columns after the span
        inner = upper[start:end, start:end].T.contiguous()
        w = np.array(weight[:, here].T, np.float32, order="C")
        own = table[here // (count // len(table))]
        values[:, here] = _round(w, own, fmt, inner, carried, error[start:end]).T
        least += carried.square().sum(dim=0)
    is_better = (least < usual) & (error.square().sum(dim=0) <= MAX_MOVED * near)
    return np.where(is_better.numpy()[:, None], values, nearest)


def _round(
    w: Array,
    scales: Array,
    fmt: formats.Format | str,
    inner: Tensor,
    carried: Tensor,
    error: Tensor,
) -> Array:
    """Round a span of columns (columns, N), the last first; ``inner`` is its part of Uᵀ.

    Fills ``error``, and adds U e to ``carried``, which comes in as c and leaves as U e + c.
    """
    c, values = carried.numpy(), np.empty(w.shape, formats.as_format(fmt).dtype)
    for j in reversed(range(len(w))):
        wanted = w[j] + c[j] / np.float32(inner[j, j])
        values[j] = formats.quantize(wanted, scales[j], fmt, 0)
        error[j] = torch.from_numpy(w[j] - values[j].astype(np.float32) * scales[j])
        carried[: j + 1].addr_(inner[j, : j + 1], error[j])
    return values
