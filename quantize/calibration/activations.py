"""The inputs of a block's linear layers, observed while the block runs.

Linear layers that read one activation are a group: they share its range, and the factors that are
folded into their columns. An activation that nothing will change goes straight into its observer.
One that smoothing or a rotation will change is spooled, since the change is known only after the
block has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from internvl_edge.errors import CalibrationError
from internvl_edge.export.towers.blocks import Block, Site
from internvl_edge.files.spool import Spool
from internvl_edge.quantize.numerics import output_error
from internvl_edge.quantize.numerics.gptq import add_rows
from internvl_edge.quantize.numerics.observers import RangeObserver
from internvl_edge.quantize.numerics.rotation import Rotation, rotation
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

NewSpool = Callable[[], Spool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Quantized linear layers that read one activation."""

    readers: tuple[str, ...]  # full names of the layers
    site: Site | None = None
    is_folded: bool = False  # whether factors can move between the site and its readers

    @property
    def key(self) -> str:
        return self.readers[0]


@dataclass(slots=True)
class Inputs:
    """The input of one group in one stream, as observed."""

    observer: RangeObserver
    kept: Spool | None  # the activations, where they change after the block has run
    sample: output_error.RowSample = field(default_factory=output_error.RowSample)
    peaks: Array | None = None  # largest |x| of each channel, where they are kept
    low: float = np.inf  # the smallest value, where they are not kept

    def take(self, values: Array) -> None:
        """Observe or keep further activations (rows, channels)."""
        self.sample.update(values)
        if self.kept is None:
            self.observer.update(values)
            self.low = min(self.low, float(values.min()))
            return
        self.kept.append(values)
        peaks = np.maximum(values.max(axis=0), -values.min(axis=0))
        self.peaks = peaks if self.peaks is None else np.maximum(self.peaks, peaks)


def groups_of(block: Block, linears: Mapping[str, nn.Linear]) -> list[Group]:
    """Group quantized linear layers by site; each is alone where a reader is not quantized."""
    groups, alone = [], dict.fromkeys(linears)
    for site in block.sites:
        readers = tuple(f"{block.name}.{reader}" for reader in site.readers)
        if not all(name in linears for name in readers):
            continue
        has_producer = f"{block.name}.{site.producer}" in linears
        is_folded = site.norm is not None or has_producer
        groups.append(Group(readers=readers, site=site, is_folded=is_folded))
        for name in readers:
            del alone[name]
    return groups + [Group(readers=(name,)) for name in alone]


@contextmanager
def watching(
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    recipe: Recipe,
    seen: dict[str, Inputs],
    products: dict[str, Array],
    new_spool: NewSpool,
) -> Iterator[Callable[[Tensor | None], None]]:
    """Observe the input of every quantized linear layer while the block runs.

    Args:
        linears: the layers, by full name.
        groups: the groups of these layers.
        recipe: decides what is kept of an input.
        seen: the inputs of each group in this stream, by the group's key; filled here.
        products: Xᵀ X of each group's input over all streams, for GPTQ; added to here.
        new_spool: makes a spool for inputs that are kept.

    Yields:
        A function to tell, before each run, which rows (B, T) are not padding; None: all.
    """
    rows: Tensor | None = None

    def look_at(unpadded: Tensor | None) -> None:
        nonlocal rows
        rows = unpadded

    def watch(group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            # cross-attention reads other sequences too, which have no padding
            is_masked = rows is not None and x.shape[:2] == rows.shape
            values = (x[rows] if is_masked else x.reshape(-1, x.shape[-1])).numpy()
            if not np.isfinite(values).all():
                raise CalibrationError(
                    f"{group.key}: calibration met NaN or infinity in its input; is the "
                    "checkpoint sound, and are the images of the kind it was trained on?"
                )
            if group.key not in seen:
                is_kept = not recipe.is_weight_only and is_changed(group, recipe)
                kept = new_spool() if is_kept else None
                seen[group.key] = Inputs(observer=RangeObserver(group.key), kept=kept)
            if recipe.is_weight_only:
                seen[group.key].sample.update(values)
            else:
                seen[group.key].take(values)
            if recipe.rounding == "gptq":
                if group.key not in products:
                    products[group.key] = np.zeros((values.shape[1],) * 2, np.float32)
                add_rows(products[group.key], values)

        return hook

    with ExitStack() as stack:
        for group in groups:
            hook = linears[group.key].register_forward_pre_hook(watch(group))
            stack.callback(hook.remove)
        yield look_at


def is_changed(group: Group, recipe: Recipe) -> bool:
    """Tell whether the group's activation will change once the block has run."""
    return group.is_folded and (
        recipe.smooth is not None or head_rotation(group, recipe) is not None
    )


def head_rotation(group: Group, recipe: Recipe) -> Rotation | None:
    """Return the rotation of each head of an activation; None if it is not attention's output."""
    width = None if group.site is None else group.site.head_dim
    return rotation(width, recipe.rotation_seed) if recipe.rotate and width else None
