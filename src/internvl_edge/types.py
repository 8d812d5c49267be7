"""The array types that every room names. Imports NumPy and nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Array", "Feeds", "Shape"]

Array: TypeAlias = np.ndarray[Any, Any]  # of any shape and dtype
Feeds: TypeAlias = Mapping[str, Array]  # a session's inputs by name
Shape: TypeAlias = tuple[int, ...]
