"""Weights that are drawn and not stored: the same bits on every machine, in both layouts.

PCG64's raw integers are fixed by NumPy's promise, and only sums, products, quotients and square
roots follow, which IEEE 754 rounds in one way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from support.checkpoints import write_raw
from support.checkpoints.family import native_names, packed

NEW_NAMES = ("llama3", "qwen3", "phi3")  # in hf/, as transformers 5 writes them
SHARDS = {("internlm2", "chat"): 2, ("qwen3", "hf"): 2}


def write_weights(kind: Path, *, is_new: bool = False) -> None:
    """Write the weights that ``weights.json`` describes into ``chat`` and ``hf``.

    Args:
        kind: the folder of one.
        is_new: the file is to say what is drawn now, as new reference numbers will be of it.

    Raises:
        ValueError: other weights are drawn than the reference numbers are of.
    """
    told = json.loads((kind / "weights.json").read_text())
    state = draw(told["shapes"], told["seed"])
    found = digest(state)
    if is_new:
        (kind / "weights.json").write_text(json.dumps({**told, "sha256": found}))
    elif found != told["sha256"]:
        raise ValueError(
            f"{kind / 'weights.json'}: expected weights of SHA-256 {told['sha256']}, of which the"
            f" reference numbers are, drew {found}: undo the change of drawn.py or of the file, or"
            " run support/checkpoints/golden_family.py --write"
        )
    name, raw = kind.name, json.loads((kind / "chat" / "config.json").read_text())
    width = raw["vision_config"]["hidden_size"]
    native = native_names(state, width, is_new=name in NEW_NAMES)
    if name == "phi3":
        native = packed(native, name, raw)
    for layout, tensors in (("chat", packed(state, name, raw)), ("hf", native)):
        config = json.loads((kind / layout / "config.json").read_text())
        write_raw(kind / layout, config, tensors, shards=SHARDS.get((name, layout), 1))


def draw(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Draw weights that leave every part of the computation visible in the output.

    Norms are 0.5 to 1.5, biases and LayerScale about 0.3; rows of a matrix are of different sizes,
    as trained ones are.
    """
    bits = np.random.PCG64(seed)
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            of_norm = name.endswith("weight")
            values = 0.5 + uniform(bits, shape) if of_norm else 0.3 * bell(bits, shape)
        else:
            values = bell(bits, shape) * (0.7 / np.sqrt(shape[-1]))
            if name.endswith("weight"):
                rows = 0.5 + 1.5 * uniform(bits, shape[:1])
                values *= rows.reshape(-1, *[1] * (len(shape) - 1))
            if name.endswith("lm_head.weight"):
                values *= 2  # the best of two logits is told apart in float32
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def uniform(bits: np.random.PCG64, shape: list[int]) -> NDArray[np.float64]:
    """Draw multiples of 2⁻²⁴ in [0, 1)."""
    return (integers(bits, shape) >> np.uint64(40)).astype(np.float64) / 2**24


def bell(bits: np.random.PCG64, shape: list[int]) -> NDArray[np.float64]:
    """Draw sums of four integers of 16 bits, with mean 0 and standard deviation 1."""
    four = integers(bits, [*shape, 1]) >> np.array([0, 16, 32, 48], np.uint64)
    total = (four & np.uint64(0xFFFF)).astype(np.float64).sum(axis=-1)
    return (total - 2 * 0xFFFF) / np.sqrt((2.0**32 - 1) / 3)


def integers(bits: np.random.PCG64, shape: list[int]) -> NDArray[np.uint64]:
    return bits.random_raw(int(np.prod(shape))).reshape(shape)


def digest(state: dict[str, torch.Tensor]) -> str:
    """Compute SHA-256 of names and bytes."""
    known = hashlib.sha256()
    for name, tensor in state.items():
        known.update(name.encode() + b"\0" + tensor.numpy().astype("<f4").tobytes())
    return known.hexdigest()
