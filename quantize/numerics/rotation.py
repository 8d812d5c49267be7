"""Rotations: an orthogonal change of basis that spreads outliers over all channels.

A few channels of a transformer's residual stream are tens or hundreds of times larger than the
rest, and one scale per tensor spends its levels on them. In another orthonormal basis every
channel is a mixture of all, and none stands out (QuaRot, Ashkboos et al., 2024; SliceGPT). With an
orthogonal Q, x' = x Q in place of x costs nothing at inference:

    a reader of the stream     y = norm(x) diag(g) Wᵀ      becomes   norm(x') (W diag(g) Q)ᵀ
    a writer into it           x += diag(l) (z Wᵀ + b)     becomes   x' += z (Qᵀ diag(l) W)ᵀ + …

since RMSNorm without its gain g commutes with Q: |x Q| = |x|. So gains move into the readers,
LayerScale l into the writers, embeddings are stored rotated, and x = x' Qᵀ is one product where
the stream leaves the tower. LayerNorm also subtracts the mean, which is the component along the
all-ones vector 1; it commutes with Q if 1 Q = 1.

**The Q used here** is symmetric, its own inverse, and maps 1 to itself, which is all that both
norms need:

    Q = U S Uᵀ,     U = H ⊗ D,     S = diag(±1), S₀ = +1

For a width 2ᵏ·m, H is the Hadamard matrix of size 2ᵏ over √2ᵏ and D the orthonormal cosine
transform of the odd size m. The first column of each is constant, so U e₀ = 1/√n, and S₀ = +1
preserves it. The other signs are random: entry (i, j) of Q is a random sum Σₖ ±Uᵢₖ Uⱼₖ with
variance close to 1/n, so an outlier of size a is spread over entries near a/√n. Q is never formed
to rotate a weight: U = (H₁ ⊗ H₂) ⊗ D = H₁ ⊗ (H₂ ⊗ D) takes two small products, 64 and 50 wide at
width 3200.

The factors of Q are computed in float64; products in float32, which leaves weights with relative
errors of 1e-7. The same seed and width give the same Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvl_edge.errors import UsageError
from internvl_edge.quantize.numerics.threads import each
from internvl_edge.types import Array

Floats = NDArray[np.float64]
_CHUNK = 1 << 18  # elements at a time: they fit a core's cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """An orthogonal, symmetric matrix Q of some width with 1 Q = 1."""

    left: Floats  # (a, a), symmetric; U = left ⊗ right
    right: Floats  # (b, b)
    signs: Floats  # (a·b,)

    @property
    def width(self) -> int:
        """The number of channels."""
        return int(self.signs.size)

    def apply(
        self, values: Array, axis: int = -1, *, in_place: bool = False
    ) -> NDArray[np.float32]:
        """Multiply every vector along ``axis`` by Q; float32.

        Args:
            values: of any float type.
            axis: the first or the last.
            in_place: overwrite float32 values; fresh memory costs as much as the products.

        Raises:
            UsageError: the axis has another length than ``width``.
        """
        if values.shape[axis] != self.width:
            raise UsageError(
                f"rotation: expected {self.width} channels along axis {axis}, found an array of "
                f"shape {values.shape}"
            )
        is_own = in_place and values.dtype == np.float32 and values.flags.c_contiguous
        result = values if is_own else np.empty(values.shape, np.float32)
        shape = (self.width, -1) if axis == 0 else (-1, self.width)
        source, target = (x.reshape(shape) for x in (values, result))
        turned, along = (self._columns, 1) if axis == 0 else (self._rows, 0)
        step = max(_CHUNK // self.width, 1)

        def turn(start: int) -> None:
            part = (slice(None),) * along + (slice(start, start + step),)
            target[part] = turned(source[part])

        each(turn, range(0, source.shape[along], step))
        return result

    def matrix(self) -> NDArray[np.float32]:
        """Return Q itself, (width, width) in float32."""
        return self.apply(np.eye(self.width))

    def _rows(self, rows: Array) -> Array:
        """Multiply rows (n, a·b) by Q: each row is a matrix (a, b), multiplied from both sides."""
        left, right, signs = self._factors()
        x = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
        x = left.T @ (x.reshape(-1, *signs.shape) @ right)  # x U, (n, a, b)
        x *= signs
        return (left @ x @ right.T).numpy().reshape(rows.shape)

    def _columns(self, columns: Array) -> Array:
        """Multiply columns (a·b, n) by Q, from the left: here nothing is transposed."""
        left, right, signs = self._factors()
        a, b = len(left), len(right)
        x = torch.from_numpy(np.ascontiguousarray(columns, np.float32))
        x = right.T @ (left @ x.reshape(a, -1)).reshape(a, b, -1)  # Uᵀ x, (a, b, n)
        x *= signs[:, :, None]
        x = right @ (left @ x.reshape(a, -1)).reshape(a, b, -1)
        return x.numpy().reshape(columns.shape)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        signs = self.signs.reshape(len(self.left), len(self.right))
        left, right, s = (torch.from_numpy(x).float() for x in (self.left, self.right, signs))
        return left, right, s


def rotation(width: int, seed: int) -> Rotation:
    """Return the rotation of ``width`` channels that belongs to a seed."""
    power = width & -width  # the largest power of two that divides it
    signs = np.random.default_rng((seed, width)).choice((-1.0, 1.0), width)
    signs[0] = 1.0
    side = min(power, 1 << (width.bit_length() // 2))  # a power of two near √width
    right = np.asarray(np.kron(_hadamard(power // side), _cosine(width // power)), np.float64)
    return Rotation(left=_hadamard(side), right=right, signs=signs)


def rotate_heads(
    values: Array, head: Rotation, axis: int = -1, *, in_place: bool = False
) -> NDArray[np.float32]:
    """Rotate each head by itself; heads are adjacent along ``axis``, which is 0 or -1."""
    heads = values.shape[axis] // head.width
    if axis == 0:
        split = values.reshape(heads, head.width, -1)
        turned = each(lambda one: head.apply(one, axis=0, in_place=in_place), [*split])
        return values if in_place else np.concatenate(turned).reshape(values.shape)
    split = values.reshape(*values.shape[:-1], heads, head.width)
    return head.apply(split, in_place=in_place).reshape(values.shape)


def _hadamard(size: int) -> Floats:
    """Return Sylvester's matrix over √size: symmetric, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2.0)
    return matrix


def _cosine(size: int) -> Floats:
    """Return the matrix of columns cos(π k (i + ½) / size), normalised; the first is constant."""
    k = np.arange(size)
    matrix = np.cos(np.pi * (k[:, None] + 0.5) * k / size) * np.sqrt(2.0 / size)
    matrix[:, 0] = np.sqrt(1.0 / size)
    return np.asarray(matrix)
