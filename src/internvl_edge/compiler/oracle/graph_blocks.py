"""A graph of a component, its blocks compared with PyTorch's one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir as ir

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.oracle.readings import (
    BlockReading,
    GraphReading,
    TensorReading,
    tensor_reading,
)
from internvl_edge.compiler.oracle.reference_block import block_outputs
from internvl_edge.compiler.oracle.run_graph import open_graph, run_as_reference
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import agreement, component_feeds, sample_feeds, with_noise
from internvl_edge.export.graph.one_block import (
    BLOCK_INPUT,
    BLOCK_OUTPUT,
    isolate_block,
    isolate_front,
    num_blocks,
)
from internvl_edge.export.graph.signature import graph_capacity
from internvl_edge.export.graph.uint8_input import on_levels, preprocessing_inside
from internvl_edge.quantize.graph.qdq import bypass_activations
from internvl_edge.types import Array

Arrays = dict[str, Array]


class GraphBlocks:
    """One graph of a component, and the inputs that it is run on."""

    def __init__(
        self,
        artifact: Artifact,
        checkpoint: Checkpoint,
        quantization: Quantization | None,
        component: str,
        file: str,
        *,
        is_wide: bool,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        self._open = partial(open_graph, device=device, num_threads=num_threads)
        self.checkpoint, self.component = checkpoint, component
        self.is_wide = is_wide  # in 16 bits, roundings to the other side are many
        self.quantization, self.path = quantization, artifact.path / file
        tower = COMPONENTS[component].tower
        assert tower is not None
        model = ir.load(self.path)
        self.tower, self.depth = tower, num_blocks(model, tower)
        self.preprocessing = preprocessing_inside(artifact.manifest)
        feeds = _feeds(checkpoint, artifact.manifest.image_size, component, graph_capacity(model))
        self.feeds = on_levels(feeds, self.preprocessing)

    def read(self, bound_db: float, report: Report) -> GraphReading:
        """Run every block, each on what the one before it left."""
        blocks: list[BlockReading] = []
        hidden: Array | None = None  # PyTorch's, (B, T, C)
        drifting = self._front()  # the graph's own
        for index in range(self.depth):
            report(
                Progress(
                    step="bisect",
                    detail=f"{self.path.name}, block {index}",
                    done=index,
                    total=self.depth,
                )
            )
            given, reference, expected = block_outputs(
                self.checkpoint, self.quantization, self.component, index, self.feeds, hidden
            )
            actual, unrounded, drifted = self._run(index, given, drifting, list(expected))
            tensors = self._tensors(index, reference, expected, actual, bound_db)
            if index == 0:
                tensors.insert(0, tensor_reading("embeddings", given, given, drifting, bound_db))
            output = reference[BLOCK_OUTPUT]
            blocks.append(
                BlockReading(
                    index=index,
                    isolated_db=agreement(output, actual[BLOCK_OUTPUT]).sqnr_db,
                    accumulated_db=agreement(output, drifted).sqnr_db,
                    unrounded_db=None
                    if unrounded is None
                    else agreement(output, unrounded).sqnr_db,
                    tensors=tuple(tensors),
                )
            )
            hidden, drifting = output, drifted
        return GraphReading(
            component=self.component,
            file=self.path.name,
            against="PyTorch" if self.quantization is None else "simulated quantization",
            bound_db=bound_db,
            blocks=tuple(blocks),
        )

    def _front(self) -> Array:
        model = ir.load(self.path)
        isolate_front(model, self.tower)
        return self._session_outputs(model, self.feeds)[BLOCK_INPUT]

    def _run(
        self, index: int, given: Array, drifting: Array, names: Sequence[str]
    ) -> tuple[Arrays, Array | None, Array]:
        """Run the graph's block on two inputs, and without rounding on the first."""
        is_last = index == self.depth - 1
        model = ir.load(self.path)
        isolate_block(model, self.tower, index, names, with_tail=is_last)
        feeds = {**self.feeds, BLOCK_INPUT: given}
        with self._open(self.path, model) as session:
            actual = run_as_reference(session, feeds, self.preprocessing)
            feeds[BLOCK_INPUT] = drifting
            drifted = run_as_reference(session, feeds, self.preprocessing)[BLOCK_OUTPUT]
        if self.quantization is None:
            return actual, None, drifted
        model = ir.load(self.path)
        isolate_block(model, self.tower, index, ())
        bypass_activations(model)
        unrounded = self._session_outputs(model, {**self.feeds, BLOCK_INPUT: given})
        return actual, unrounded[BLOCK_OUTPUT], drifted

    def _session_outputs(self, model: ir.Model, feeds: Mapping[str, Array]) -> Arrays:
        with self._open(self.path, model) as session:
            return run_as_reference(session, feeds, self.preprocessing)

    def _tensors(
        self, index: int, reference: Arrays, expected: Arrays, actual: Arrays, bound_db: float
    ) -> list[TensorReading]:
        """Read tensors in the order of the graph's outputs, which is that of the modules' ends."""
        inner = [name for name in actual if name in expected and name not in self._tail_names]
        tail = [name for name in actual if name in self._tail_names]
        prefix = f"{self.tower}.{index}"
        names = {name: f"{prefix}.{name}" for name in inner} | {name: name for name in tail}
        names[BLOCK_OUTPUT] = prefix
        wanted = reference if self.is_wide else expected
        return [
            tensor_reading(names[n], wanted[n], expected[n], actual[n], bound_db)
            for n in (*inner, *tail)
        ]

    @property
    def _tail_names(self) -> tuple[str, ...]:
        return COMPONENTS[self.component].outputs


def _feeds(checkpoint: Checkpoint, image_size: int, component: str, capacity: int | None) -> Arrays:
    """Make seeded inputs of a component; vision tokens are noise too: no tower is run for them."""
    config = checkpoint.config
    feeds = with_noise(sample_feeds(config, image_size), config, image_size)
    return component_feeds(component, feeds, config, capacity)
