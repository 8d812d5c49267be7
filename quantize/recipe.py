"""Recipes: everything that decides how a model is quantized, as one frozen dataclass.

The manifest of an artifact contains its recipe, and ``--recipe`` reads one from a JSON file with
the same keys. Keys left out of a file keep the defaults below; unknown keys and invalid values are
refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from internvl_edge.errors import InputError, UsageError
from internvl_edge.files.reading import read_json

FormatName = Literal["int8", "fp8"]
WeightFormat = Literal["int8", "fp8", "int4"]
Granularity = Literal["per-channel", "per-tensor"]
Base = Literal["fp32", "fp16", "bf16"]
EngineBase = Literal["fp16", "bf16"]
RangeChoice = Literal["max", "percentile", "mse", "entropy", "auto"]
Rounding = Literal["nearest", "gptq"]

MAX_FILE_NBYTES = 1 << 20
VISION = "vision_model."  # prefix of the vision tower's parameters
HEADS = ("qllama.lm_head", "language_model.lm_head")  # products with all of a vocabulary
PRESETS: dict[str, dict[str, Any]] = {
    "int8": {
        "activations": "int8",
        "weights": "int8",
        "fold": True,
        "rotate": True,
        "smooth": "auto",
        "range_method": "auto",
        "shift": True,
        "spread": True,
        "correct_bias": True,
    },
    # The exponent of E4M3 absorbs outliers, and mixing channels would cost small ones precision:
    # nothing is rotated or smoothed.
    "fp8": {"activations": "fp8", "weights": "fp8", "fold": True, "correct_bias": True},
    "int8-wo": {"activations": None, "weights": "int8"},
    "int4-wo": {"activations": None, "weights": "int4", "smooth": "auto"},
}
_CHOICES: dict[str, Any] = {
    "weights": WeightFormat,
    "granularity": Granularity,
    "range_method": RangeChoice,
    "engine_base": EngineBase,
    "rounding": Rounding,
}


def is_head(name: str) -> bool:
    """Tell whether a linear layer, or its weight, is a language model's vocabulary head."""
    return name.removesuffix(".weight") in HEADS


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The choices that decide how linear layers are quantized and calibrated."""

    name: str
    activations: FormatName | None = "int8"  # per tensor, static; None: not rounded (weight-only)
    # The format of the activations, since no kernel multiplies int8 by fp8; int4 is weight-only
    weights: WeightFormat = "int8"
    block_size: int = 128  # inputs that share a scale in int4; see ``int4.block_of``
    granularity: Granularity = "per-channel"  # of weight scales; a channel is an output
    # Of weights: each to its nearest value, or all of an output together by its error (``gptq``)
    rounding: Rounding = "nearest"
    fold: bool = False  # norm gains and LayerScale into the adjacent linear layers
    rotate: bool = False  # the residual streams, and each head between v and its projection
    rotation_seed: int = 0
    range_method: RangeChoice = "mse"  # of activations; weights always use their maximum
    percentile: float = 99.99  # percent of |x| that do not saturate; for range_method percentile
    # SmoothQuant's alpha in [0, 1], "auto" for the best alpha, or None; weight-only: AWQ or None
    smooth: float | Literal["auto"] | None = None
    shift: bool = False  # move GELU's output so that its range is symmetric; one Sub at run time
    # Divide outlier channels of GELU's output where that gains 3 dB; one Mul at run time
    spread: bool = False
    correct_bias: bool = False  # subtract the mean error of a linear layer's output from its bias
    # Also both products of the vision tower's attention; fp8 only; see ``calibration.attention``
    attention: Literal["fp8"] | None = None
    # Of the vocabulary's product, weights alone, an output at a time; None: as it is stored. Where
    # the token embedding is the head too, it stays as it is
    head: Literal["int8"] | None = None
    exclude: tuple[str, ...] = ()  # regular expressions; linears with a match keep 16 or 32 bits
    base: Base | None = None  # type of unquantized parts in ONNX Runtime's graphs; None: fp32
    engine_base: EngineBase = "fp16"  # the same in TensorRT's engines
    min_features: int = 16  # fewer inputs or outputs than this do not pay (vendor's rule)
    seed: int = 0  # of the choice of samples
    num_samples: int = 32  # images, each with a caption
    language: Recipe | None = None  # for the blocks after the vision tower; None: this recipe

    def __post_init__(self) -> None:
        for field in _CHOICES:
            _require_choice(field, getattr(self, field), get_args(_CHOICES[field]))
        _require_choice("activations", self.activations, (None, *get_args(FormatName)))
        _require_choice("base", self.base, (None, *get_args(Base)))
        _require_choice("head", self.head, (None, "int8"))
        self._check_formats()
        self._check_attention()
        _require(isinstance(self.name, str) and self.name != "", "name", "a name", self.name)
        _require_number("percentile", self.percentile, above=0.0, most=100.0)
        if self.smooth is not None and self.smooth != "auto":
            _require_number("smooth", self.smooth, least=0.0, most=1.0)
        for field in ("fold", "rotate", "shift", "spread", "correct_bias"):
            value = getattr(self, field)
            _require(isinstance(value, bool), field, "true or false", value)
        _require(self.fold or not self.rotate, "fold", "true with rotate", self.fold)
        _require(self.fold or not self.shift, "fold", "true with shift", self.fold)
        counts = ("min_features", 1), ("seed", 0), ("rotation_seed", 0), ("num_samples", 1)
        for field, least in (*counts, ("block_size", 16)):
            value = getattr(self, field)
            _require(type(value) is int and value >= least, field, f"an integer ≥ {least}", value)
        _require_patterns(self.exclude)
        self._check_language()

    def _check_formats(self) -> None:
        if self.activations is not None and self.activations != self.weights:
            raise InputError(
                f"recipe: weights must be of the activations' format {self.activations!r}, "
                f"found {self.weights!r}"
            )
        if not self.is_weight_only:
            is_int8 = self.activations == "int8"
            _require(is_int8 or not self.shift, "shift", "false but for int8", self.shift)
            _require(self.shift or not self.spread, "shift", "true with spread", self.shift)
            return
        _require(self.weights != "fp8", "weights", "int8 or int4 without activations", self.weights)
        is_searched = self.smooth in (None, "auto")
        _require(is_searched, "smooth", 'null or "auto" without activations', self.smooth)
        for field in ("shift", "spread", "correct_bias"):
            value = getattr(self, field)
            _require(not value, field, "false without activations", value)

    def _check_attention(self) -> None:
        """Require no rotation or smoothing, since attention's operands are observed without."""
        _require_choice("attention", self.attention, (None, "fp8"))
        if self.attention is None:
            return
        _require(self.activations == "fp8", "activations", "fp8 with attention", self.activations)
        _require(not self.rotate, "rotate", "false with attention", self.rotate)
        _require(self.smooth is None, "smooth", "null with attention", self.smooth)

    def _check_language(self) -> None:
        """Require the same folding and rotation: they change the checkpoint as a whole."""
        if self.language is None:
            return
        is_one = isinstance(self.language, Recipe) and self.language.language is None
        _require(is_one, "language", "a recipe without another in it", self.language)
        own = self.language.attention
        _require(own is None, "language", "without attention, which is the vision tower's", own)
        for field in ("fold", "rotate", "rotation_seed", "seed", "num_samples"):
            value, inner = getattr(self, field), getattr(self.language, field)
            _require(inner == value, "language", f"of {field} {value}, as around it", inner)

    @property
    def is_weight_only(self) -> bool:
        """True if activations are not quantized; else they have the format of the weights."""
        return self.activations is None

    def of(self, name: str) -> Recipe:
        """Return the recipe that applies to a linear layer or parameter."""
        own = self if self.language is None or name.startswith(VISION) else self.language
        head = own.head or self.head
        if head is None or not is_head(name):
            return own
        return Recipe(name=own.name, activations=None, weights=head, head=head)

    def excludes(self, linear_name: str) -> bool:
        """Tell whether the linear layer called ``linear_name`` keeps its precision."""
        return any(re.search(pattern, linear_name) for pattern in self.exclude)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON types; the inverse of :meth:`from_json`."""
        language = None if self.language is None else self.language.to_json()
        changed = {"exclude": list(self.exclude), "language": language}
        return dataclasses.asdict(self) | changed

    @classmethod
    def from_json(cls, data: object) -> Recipe:
        """Make the recipe that a JSON object describes.

        Raises:
            InputError: it is not an object, or has an unknown key or an invalid value.
        """
        if not isinstance(data, dict):
            raise InputError(f"recipe: expected a JSON object, found {type(data).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown or "name" not in data:
            raise InputError(
                f"recipe: expected a name and any of {', '.join(known)}; "
                f"found {'no name' if not unknown else 'also ' + ', '.join(unknown)}"
            )
        exclude = data.get("exclude", [])
        _require(isinstance(exclude, list), "exclude", "a list of patterns", exclude)
        language = data.get("language")
        _require(language is None or isinstance(language, dict), "language", "a recipe", language)
        inner = None if language is None else cls.from_json(language)
        return cls(**data | {"exclude": tuple(exclude), "language": inner})


def recipe_for(precision: str) -> Recipe:
    """Return the default recipe of a precision.

    Raises:
        UsageError: the precision does not quantize, or is unknown.
    """
    if precision not in PRESETS:
        raise UsageError(
            f"a recipe needs one of the precisions {', '.join(PRESETS)}, found {precision!r}"
        )
    return Recipe(name=precision, **PRESETS[precision])


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a JSON file.

    Raises:
        InputError: the file is absent, not JSON, or not a recipe; the message names it.
    """
    try:
        data = read_json(path, MAX_FILE_NBYTES, InputError, unique=True)
    except InputError as error:
        raise InputError(f"{error}; expected a recipe in JSON") from error
    try:
        return Recipe.from_json(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _require(holds: bool, field: str, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"recipe: {field} must be {expected}, found {value!r}")


def _require_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    known = value is None or isinstance(value, str)  # refuses unhashable values, and 1 == True
    _require(known and value in choices, field, f"one of {choices}", value)


def _require_number(
    field: str, value: object, *, most: float, least: float = 0.0, above: float | None = None
) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and least <= value <= most and (above is None or value > above)  # type: ignore[operator]
    span = f"a number from {least:g} to {most:g}" if above is None else f"in ({above:g}, {most:g}]"
    _require(inside, field, span, value)


def _require_patterns(patterns: object) -> None:
    _require(isinstance(patterns, tuple), "exclude", "a tuple of patterns", patterns)
    assert isinstance(patterns, tuple)
    for pattern in patterns:
        _require(isinstance(pattern, str), "exclude", "regular expressions", pattern)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"recipe: exclude must be regular expressions, found {pattern!r}: {error}"
            ) from error
