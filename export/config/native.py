"""The layout of transformers' own InternVL classes: ``text_config``, and tiling in another file.

It is the same model as in the layout ``internvl_chat`` under other keys (docs/model.md, section
4.6). Files written by transformers 5 say ``rope_parameters``, ``dtype`` and ``layer_types``, and a
``tie_word_embeddings`` at the top that need not be true of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.chat import IMAGE_TOKEN, ChatConfig, read_tied
from internvl_edge.export.config.fields import listed, read_json, section, typed
from internvl_edge.export.config.language import FAMILIES
from internvl_edge.export.config.prompts import find_token_id
from internvl_edge.files.reading import is_there

__all__ = ["PROCESSOR_FILES", "is_native", "native_vision", "processor_settings", "read_native"]

ARCHITECTURE = "InternVLForConditionalGeneration"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
QK_NORM_EPS = 1e-6  # fixed there, while the layout internvl_chat has layer_norm_eps
# What transformers takes where a vision_config has no such key.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "num_channels": 3,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
# Keys with one value in every published file; another one is another model.
ONLY_VISION = {
    "use_mean_pooling": True,  # false: one more LayerNorm after the tower
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
}
ONLY_TOP = {
    "vision_feature_select_strategy": "default",  # the class token is dropped
    "projector_hidden_act": "gelu",
}
IMAGE_TOKEN_ID = 151667  # where the config has none


def is_native(raw: dict[str, Any]) -> bool:
    """Tell whether a config has this layout; InternVL-14B says model_type internvl too."""
    names = listed(raw.get("architectures"))
    is_named = raw.get("model_type") == "internvl" or ARCHITECTURE in names
    return is_named and isinstance(raw.get("text_config"), dict)


def native_vision(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the vision config under the keys of the layout ``internvl_chat``.

    Raises:
        CheckpointError: a value that is not implemented.
    """
    given = raw.get("vision_config")
    vision = {} if given is None else section(raw, "vision_config", path)
    _require_values(vision, ONLY_VISION, path, "vision_config.")
    vision = VISION_DEFAULTS | {k: v for k, v in vision.items() if v is not None}
    has_qk_norm = bool(vision.get("use_qk_norm", False))
    if has_qk_norm and vision["layer_norm_eps"] != QK_NORM_EPS:
        raise CheckpointError(
            f"{path}: vision_config.layer_norm_eps: expected {QK_NORM_EPS:g}, which the norms of "
            f"queries and keys always have, found {vision['layer_norm_eps']!r}"
        )
    return vision | {
        "image_size": _side(vision["image_size"], path, "vision_config.image_size"),
        "patch_size": _side(vision["patch_size"], path, "vision_config.patch_size"),
        "qkv_bias": bool(vision.get("attention_bias", False)),
        "qk_normalization": has_qk_norm,
    }


def read_native(raw: dict[str, Any], vision: dict[str, Any], path: Path) -> tuple[ChatConfig, int]:
    """Read the chat part of an ``internvl_hf`` config, and its ``vision_feature_layer``.

    Args:
        raw: the whole config.
        vision: of ``native_vision``.
        path: of the file.

    Raises:
        CheckpointError: a value is invalid, not implemented, or disagrees with another file.
    """
    _require_values(raw, ONLY_TOP, path, "")
    text = section(raw, "text_config", path)
    # not by its architectures: those of the original, such as InternLM2, of which it is the twin
    known = {family.model_type: name for name, family in FAMILIES.items()}
    kind = str(text.get("model_type"))
    name = known.get(kind, kind)
    ratio = typed(raw.get("downsample_ratio", 0.5), float, path, "downsample_ratio")
    if ratio not in (1.0, 0.5, 0.25):
        raise CheckpointError(f"{path}: downsample_ratio must be 1, 0.5 or 0.25, found {ratio}")
    _require_sequence(raw, vision, ratio, path)
    settings = processor_settings(path.parent)
    tiles = {
        ours: typed(settings[key], int, path.parent / PROCESSOR_FILES[0], key)
        for ours, key in (
            ("min_dynamic_patch", "min_patches"),
            ("max_dynamic_patch", "max_patches"),
        )
        if settings.get(key) is not None
    }
    config = ChatConfig(
        llama=read_tied(raw, text, name, path, "text_config."),
        architecture=name,
        language_width=typed(text.get("hidden_size", 4096), int, path, "text_config.hidden_size"),
        layout="internvl_hf",
        image_size=vision["image_size"],
        downsample_ratio=ratio,
        ps_version="v2",
        template="",
        dynamic_image_size=True,  # the processor cuts tiles whatever the file says of that
        use_thumbnail=True,
        **{"max_dynamic_patch": 12, **tiles},
        image_token_id=_image_token_id(raw, path),
    )
    layer = raw.get("vision_feature_layer", -1)
    return config, typed(layer, int, path, "vision_feature_layer")


def processor_settings(directory: Path) -> dict[str, Any]:
    """Read how a checkpoint's pictures become tensors; transformers 5 has it inside another file.

    Raises:
        CheckpointError: a file that is not an object of JSON.
    """
    settings: dict[str, Any] = {}
    for name in reversed(PROCESSOR_FILES):
        if is_there(directory / name):
            raw = read_json(directory / name)
            nested = raw.get("image_processor")
            if name == PROCESSOR_FILES[1]:
                raw = nested if isinstance(nested, dict) else {}
            settings |= raw
    return settings


def _require_values(raw: dict[str, Any], only: dict[str, Any], path: Path, prefix: str) -> None:
    for key, value in only.items():
        if raw.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {prefix}{key}: expected {value!r}, as in every published model, found "
                f"{raw[key]!r}; other values are not implemented"
            )


def _side(value: Any, path: Path, key: str) -> int:
    """Read the side of a square, written once or twice."""
    sides = value if isinstance(value, list) else [value]
    if len(sides) not in (1, 2) or sides[0] != sides[-1]:
        raise CheckpointError(f"{path}: {key}: expected a square, found {value!r}")
    side: int = typed(sides[0], int, path, key)
    return side


def _require_sequence(
    raw: dict[str, Any], vision: dict[str, Any], ratio: float, path: Path
) -> None:
    """Require as many places per tile as the tower and the projector give tokens."""
    places = raw.get("image_seq_length")
    side = vision["image_size"] // max(vision["patch_size"], 1)
    count = round((side * ratio) ** 2)
    if places not in (None, count):
        raise CheckpointError(
            f"{path}: image_seq_length: expected {count}, the tokens of a tile of "
            f"{vision['image_size']} pixels, found {places!r}"
        )


def _image_token_id(raw: dict[str, Any], path: Path) -> int:
    """Find the id of places of image tokens; the tokenizer and the config must agree on it."""
    own = find_token_id(path.parent, IMAGE_TOKEN)
    given = raw.get("image_token_id")
    if given is None:
        return IMAGE_TOKEN_ID if own is None else own
    named: int = typed(given, int, path, "image_token_id")
    if own not in (None, named):
        raise CheckpointError(
            f"{path}: image_token_id {named}: expected {own}, the id of {IMAGE_TOKEN} in the "
            "checkpoint's tokenizer files; one of the two is of another model"
        )
    return named
