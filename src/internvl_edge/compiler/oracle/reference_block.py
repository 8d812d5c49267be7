"""What a block of the reference gives inside, seen while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from internvl_edge.export.graph.one_block import BLOCK_INPUT, BLOCK_OUTPUT
from internvl_edge.types import Array

OUTPUT_LAYER = "o_proj"  # of QLLaMA's attention: what it reads is attention's own result
WATCHED = ("Norm", "AttentionCore")  # how the names of such modules end; linear layers too


@contextmanager
def watching(block: nn.Module, hidden: Array | None) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of a block's norms, linear layers and attentions while it runs.

    Args:
        block: a block of PyTorch's tower.
        hidden: what to feed it in place of what it is given; None: nothing.
    """
    seen: dict[str, Tensor] = {}

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen[BLOCK_INPUT] = inputs[0] if hidden is None else torch.from_numpy(hidden)
        return seen[BLOCK_INPUT], *inputs[1:]

    def leave(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].detach()

        return hook

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(enter).remove)
        stack.callback(block.register_forward_hook(leave(BLOCK_OUTPUT)).remove)
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__.endswith(WATCHED):
                stack.callback(module.register_forward_hook(leave(path)).remove)
            parent, _, name = path.rpartition(".")
            if name == OUTPUT_LAYER:  # before it is rounded
                hook = module.register_forward_pre_hook(read(parent), prepend=True)
                stack.callback(hook.remove)
        yield seen
