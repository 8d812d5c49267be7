"""A block of the reference, and the outputs inside of it, seen while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import reference_outputs
from internvl_edge.export.config.checkpoint import CheckpointConfig, with_depth
from internvl_edge.export.graph.one_block import BLOCK_INPUT, BLOCK_OUTPUT
from internvl_edge.export.towers.blocks import component_of_one_block
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
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


def block_outputs(
    checkpoint: Checkpoint,
    quantization: Quantization | None,
    component: str,
    index: int,
    feeds: Mapping[str, Array],
    hidden: Array | None,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Compute a block's input, its outputs in PyTorch, and those that a graph should have.

    Args:
        checkpoint: in the form that the recipe quantizes.
        quantization: of the graph; None: none.
        component: its name; it runs through a tower.
        index: of the block.
        feeds: the component's.
        hidden: what to feed the block in place of what it is given; None: nothing.
    """
    config = checkpoint.config
    module, rename = component_of_one_block(checkpoint, component, index)
    reference = _watched(module, component, feeds, hidden, config)
    given = reference.pop(BLOCK_INPUT)
    expected = reference
    if quantization is not None:
        with _simulated(quantization, component, module, rename):
            expected = _watched(module, component, feeds, hidden, config)
        del expected[BLOCK_INPUT]
    return given, reference, expected


def _simulated(
    quantization: Quantization, component: str, module: nn.Module, rename: Callable[[str], str]
) -> AbstractContextManager[None]:
    stream = COMPONENTS[component].stream
    assert stream is not None
    # a wrong scale of a weight is to be found, not refused
    stored = {n: v for n, v in quantization.stored.items() if not n.endswith(SCALE_SUFFIX)}
    return replace(quantization, stored=stored).applied_to(module, stream, rename)


def _watched(
    module: nn.Module,
    component: str,
    feeds: Mapping[str, Array],
    hidden: Array | None,
    config: CheckpointConfig,
) -> dict[str, Array]:
    """Run the reference, and keep its block's input and the output of every module inside."""
    known = COMPONENTS[component]
    with watching(module.get_submodule(f"{known.tower}.0"), hidden) as seen:
        outputs = reference_outputs(module, component, feeds, with_depth(config, 1, 1))
    tail = {name: outputs[name] for name in known.outputs}
    return {name: tensor.detach().float().numpy() for name, tensor in seen.items()} | tail
