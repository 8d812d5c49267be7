"""The plan of an export: its options, after everything about them is checked."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from internvl_edge.artifact.components import COMPONENTS, WEIGHTS_FILE
from internvl_edge.artifact.publish import check_out, check_parent
from internvl_edge.compiler.precision import recipe_of
from internvl_edge.errors import CalibrationError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.side_files import check_side_files, read_preprocessing
from internvl_edge.export.components import choose_components, language_config
from internvl_edge.export.config.checkpoint import check_image_size
from internvl_edge.export.precision import QUANTIZED
from internvl_edge.export.weights.link import Transfer
from internvl_edge.quantize.calibration.images import CalibrationSet
from internvl_edge.quantize.fold import source_of, without_layer_scale
from internvl_edge.quantize.recipe import Recipe, is_head, load_recipe
from internvl_edge.runtime.images.transform import MAX_SIZE, Preprocessing

logger = logging.getLogger(__name__)

TARGETS = ("onnx", "tensorrt-rtx", "tensorrt")
LAYOUTS = ("optimum",)
Verify = Literal["auto", "full", "none"]
Input = Literal["float32", "uint8"]
DrawSamples = Callable[[int, int], CalibrationSet]  # how many, seed → samples to calibrate on
MAX_ALIGN = 65536  # the coarsest granularity that any system maps files with


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of a compilation; None is the default of each.

    A quantized model is calibrated on the folder ``calibration`` if it is given, else what
    ``samples`` draws, else a sample set that installed packages bring, of photographs, or of
    handwritten digits where the bundled demo is compiled. The command line draws scenes for the
    demo, as it was trained on (``internvl_edge.demo.scenes.calibration_set``).
    """

    out: Path
    checkpoint: Path | None = None  # None: the bundled demo
    precision: str = "fp32"
    components: tuple[str, ...] | None = None  # every one that the checkpoint has
    image_size: int | None = None  # the checkpoint's own
    input: Input = "float32"  # uint8: normalisation is in the graphs
    cache_capacity: int | None = None  # positions of a decoder's cache, in place; None: it grows
    calibration: Path | None = None  # a folder of images to calibrate on
    samples: DrawSamples | None = None  # without a folder; None: a bundled sample set
    targets: tuple[str, ...] = ("onnx",)
    layout: str | None = None  # "optimum": also what transformers' classes for CLIP open
    expect_fused: bool = False  # refuse engines that lost fused attention or 8-bit products
    weights: Transfer = "auto"
    align: int | None = None  # of every weight in its file; None: to its item size
    verify: Verify = "auto"
    min_sqnr: float | None = None  # dB that every component must keep; None: any
    max_drop: float | None = None  # of the worst row's cosine; None: any
    recipe: Path | Recipe | None = None
    head: Literal["int8"] | None = None  # of the vocabulary's product; None: as the recipe says
    memory_budget: int | None = None  # bytes resident; None: what the machine has
    force: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)  # text files to publish along


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What runs graphs that are compared with PyTorch, which is on the processor."""

    device: str = "cpu"
    num_threads: int | None = None  # of ONNX Runtime and of PyTorch; None: their own numbers

    @contextmanager
    def threads_of_torch(self) -> Iterator[None]:
        """Let PyTorch have as many threads, for a while."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Options after every check, with nothing left to refuse."""

    options: ExportOptions
    checkpoint: Checkpoint
    components: tuple[str, ...]
    image_size: int
    preprocessing: Preprocessing
    recipe: Recipe | None  # None: nothing is quantized
    is_demo: bool
    source: Checkpoint  # the checkpoint in the form that graphs compute, or the recipe quantizes

    @property
    def base(self) -> str:
        """The precision of whatever is not quantized, in the graphs that ONNX Runtime runs."""
        return self.options.precision if self.recipe is None else self.recipe.base or "fp32"

    @property
    def engine_targets(self) -> tuple[str, ...]:
        """The targets that engines are built for."""
        return tuple(target for target in self.options.targets if target != "onnx")

    @property
    def engine_base(self) -> str:
        """The same in the graphs that engines are built from."""
        return self.options.precision if self.recipe is None else self.recipe.engine_base

    @property
    def bases(self) -> tuple[str, ...]:
        """The types that a component's graphs compute in: a graph, and another for engines."""
        return tuple(dict.fromkeys((self.base, self.engine_base)))


def make_plan(options: ExportOptions) -> Plan:
    """Check every option against the checkpoint.

    Raises:
        UsageError, CheckpointError: the first thing that is wrong.
    """
    default = recipe_of(options.precision)
    for target in options.targets:
        require_choice("target", target, TARGETS)
    if options.layout is not None:
        require_choice("layout", options.layout, LAYOUTS)
    check_parent(options.out)
    check_out(options.out, force=options.force)
    recipe = _with_head(options, _recipe(options, default))
    _check_bounds(options)
    if options.calibration is not None and not options.calibration.is_dir():
        raise CalibrationError(f"{options.calibration}: expected a folder of images")
    _check_weights(options)
    if recipe is None and options.calibration is not None:
        raise UsageError(
            f"--calib {options.calibration} is for int8 and fp8, and weights in int8 and int4; "
            f"{options.precision} has nothing to calibrate"
        )
    if options.image_size is not None and options.image_size > MAX_SIZE:
        raise UsageError(f"--image-size: expected at most {MAX_SIZE}, found {options.image_size}")
    checkpoint = open_checkpoint(
        options.checkpoint or demo_checkpoint(),
        options.components,
        is_quantized=recipe is not None,
    )
    image_size = check_image_size(checkpoint.config, options.image_size)
    components = choose_components(checkpoint.config, options.components)
    _check_capacity(options.cache_capacity, checkpoint, components)
    readers = [name for name in components if COMPONENTS[name].reads_text]
    check_side_files(checkpoint.path, checkpoint.config, readers)
    _require_layers(options.precision, recipe, checkpoint)
    _require_head(options, recipe, checkpoint)
    if options.recipe is not None and recipe is not None:
        _warn_of_patterns(recipe, checkpoint)
    return Plan(
        options=options,
        checkpoint=checkpoint,
        components=components,
        image_size=image_size,
        preprocessing=read_preprocessing(checkpoint.path, image_size),
        recipe=recipe,
        is_demo=checkpoint.path.resolve() == demo_checkpoint().resolve(),
        source=_source(options, checkpoint, recipe),
    )


def _source(options: ExportOptions, checkpoint: Checkpoint, recipe: Recipe | None) -> Checkpoint:
    """Give a checkpoint the form that graphs compute: folded, but for weights that are kept.

    At fp16 LayerScale stays: it is float32 there, as the residual stream is. And so it does where a
    shard, which may be linked, has the name of what would be written.
    """
    if recipe is not None:
        return source_of(checkpoint, recipe)
    is_kept = options.weights != "auto" or options.precision not in ("fp32", "bf16")
    is_kept = is_kept or any(shard.name == WEIGHTS_FILE for shard in checkpoint.shards)
    return checkpoint if is_kept else without_layer_scale(checkpoint)


def _check_bounds(options: ExportOptions) -> None:
    require_bounds(options.min_sqnr, options.max_drop)
    is_bound = options.min_sqnr is not None or options.max_drop is not None
    if is_bound and options.verify == "none":
        raise UsageError(
            "--min-sqnr and --max-drop bound what --verify measures; leave --verify none out"
        )


def require_bounds(min_sqnr: float | None, max_drop: float | None) -> None:
    """Refuse bounds on what a precision may cost that cannot be.

    Raises:
        UsageError: names the option.
    """
    if min_sqnr is not None and not 0.0 <= min_sqnr < math.inf:
        raise UsageError(f"--min-sqnr {min_sqnr:g}: expected a number of dB from 0 up")
    if max_drop is not None and not 0.0 <= max_drop <= 1.0:
        raise UsageError(f"--max-drop: expected a number from 0 to 1, found {max_drop}")


def _require_layers(precision: str, recipe: Recipe | None, checkpoint: Checkpoint) -> None:
    """Refuse a precision whose layers the checkpoint does not have."""
    if recipe is None:
        return
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if ".layers." in name]
    if all(recipe.of(name).excludes(name) for name in names):
        raise UsageError(
            f"--precision {precision}: expected linear layers to quantize, found none; "
            f"{checkpoint.path} has no such tower, or the recipe excludes all of it"
        )


def _require_head(options: ExportOptions, recipe: Recipe | None, checkpoint: Checkpoint) -> None:
    """Refuse to quantize a head that is not there, is the token embedding too, or is too small."""
    if options.head is None or recipe is None:
        return
    heads = list(filter(is_head, checkpoint.tensors))
    for name in heads:
        features, least = min(checkpoint.tensors[name].shape), recipe.of(name).min_features
        if features < least:
            raise UsageError(
                f"--head {options.head}: expected {least} inputs and outputs or more, found "
                f"{features} of {name}; leave --head out"
            )
    if not heads:
        raise UsageError(
            f"--head {options.head}: expected a vocabulary head of its own in {checkpoint.path}, "
            "found none; leave --head out"
        )


def _warn_of_patterns(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Warn of patterns that match nothing: most likely misspelled, and what they mean quantized."""
    names = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.tensors.items()
        if ".layers." in name and name.endswith(".weight") and len(entry.shape) == 2
    ]
    cores = [f"{name.removesuffix('qkv')}core" for name in names if name.endswith(".attn.qkv")]
    for one in filter(None, (recipe, recipe.language)):
        own = [name for name in (*names, *cores) if recipe.of(name) is one]
        for pattern in one.exclude:
            if not any(re.search(pattern, name) for name in own):
                logger.warning(
                    "the recipe excludes %r, which matches no linear layer of %s; their names are "
                    "such as %s",
                    pattern,
                    checkpoint.path,
                    own[0] if own else "none",
                )


def _check_weights(options: ExportOptions) -> None:
    kept = f"--weights {options.weights} keeps the checkpoint's own bytes"
    if recipe_of(options.precision) is not None and options.weights != "auto":
        raise UsageError(f"{kept}, which {options.precision} replaces; leave --weights out")
    if options.align is None:
        return
    if not 1 <= options.align <= MAX_ALIGN or options.align & (options.align - 1):
        raise UsageError(
            f"--align: expected a power of two from 1 to {MAX_ALIGN}, found {options.align}"
        )
    if options.weights != "auto":
        raise UsageError(f"{kept}, --align {options.align} moves them; leave one of the two out")


def _check_capacity(
    capacity: int | None, checkpoint: Checkpoint, components: tuple[str, ...]
) -> None:
    """Refuse a cache in place without a decoder, or without room for the image and one token."""
    if capacity is None:
        return
    llama = language_config(checkpoint.config)
    if llama is None or not any(COMPONENTS[name].takes_cache for name in components):
        raise UsageError(
            f"--cache-capacity {capacity}: expected a decoder among the components, found "
            f"{', '.join(components)}"
        )
    internvl, most = checkpoint.config.internvl, llama.max_position_embeddings
    least = 1 if internvl is None else internvl.num_query_token + 1
    if not least <= capacity <= most:
        raise UsageError(
            f"--cache-capacity: expected {least} to {most} positions for this model, found "
            f"{capacity}"
        )


def require_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{what} must be one of {', '.join(choices)}, found {value!r}")


def demo_checkpoint() -> Path:
    """Locate the trained demo model that comes with the package."""
    return Path(str(resources.files("internvl_edge.demo") / "checkpoint"))


def _recipe(options: ExportOptions, default: Recipe | None) -> Recipe | None:
    if default is None:
        if options.recipe is not None:
            raise UsageError(
                f"--recipe {options.recipe} describes a quantization; --precision "
                f"{options.precision} has none, use {', '.join(QUANTIZED)}"
            )
        return None
    if options.recipe is None:
        return default
    if isinstance(options.recipe, Recipe):
        return options.recipe
    recipe = load_recipe(options.recipe)
    if _formats(recipe) != _formats(default):
        raise UsageError(
            f"{options.recipe} quantizes to {_formats(recipe)}, --precision {options.precision} "
            f"says {_formats(default)}"
        )
    return recipe


def _with_head(options: ExportOptions, recipe: Recipe | None) -> Recipe | None:
    """Let a recipe quantize the vocabulary head too, where the options say so."""
    if options.head is None:
        return recipe
    if recipe is None:
        raise UsageError(
            f"--head {options.head} goes with a precision that quantizes, --precision "
            f"{options.precision} does not; use {', '.join(QUANTIZED)}"
        )
    language = recipe.language and replace(recipe.language, head=options.head)
    return replace(recipe, head=options.head, language=language)


def _formats(recipe: Recipe) -> str:
    """Name the formats of weights and activations, of each tower that has its own."""
    towers = [recipe, *filter(None, [recipe.language])]
    return ", ".join(one.weights + ("-wo" if one.is_weight_only else "") for one in towers)
