"""InternVL-Chat's ``config.json``: its language model, projector and prompts.

Two layouts are published (docs/model.md, section 4):

    internvl_chat   V1-1, V1-2, V1-5: ``llm_config`` and ``vision_config``; ``mlp1``
    llava           V1.0: a LLaMA's own config with ``mm_*`` keys; ``model.mm_projector``

V1.0 also exists with QLLaMA: its tower is InternVL-14B, whose queries are image tokens as well.

The language model is a LLaMA with grouped-query attention and scaled rotary positions. Others
(InternLM2, Qwen2, Phi-3) are refused by name; the vision side still compiles on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.fields import (
    known_fields,
    read_json,
    require_choice,
    require_divisible,
    require_positive,
    section,
    typed,
)
from internvl_edge.files.reading import is_there
from internvl_edge.runtime.text.templates import TEMPLATES

Layout = Literal["internvl_chat", "llava"]
RopeType = Literal["default", "linear", "dynamic", "llama3"]

SUPPORTED = ("LlamaForCausalLM", "LlavaLlamaForCausalLM")
# Rotary scaling → the keys that it requires.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
IMAGE_TOKEN = "<IMG_CONTEXT>"
LLAVA_IMAGE_TOKEN_ID = -200
LLAVA_ARCHITECTURE = "LlavaLlamaForCausalLM"
LLAVA_PROJECTOR = "mlp2x_gelu"
QUERY_PROJECTOR = "two_mlp"  # one MLP for patches, one for QLLaMA's queries
LLAVA_224_SIZE = 336  # the resolution that the 224 px tower runs at


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """A LLaMA's configuration with transformers' names, and its rotary scaling in single fields."""

    hidden_size: int = 4096  # D
    num_attention_heads: int = 32
    num_key_value_heads: int = 32  # each is shared by neighbouring query heads
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    low_freq_factor: float = 1.0  # of llama3's scaling, like the next two
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int = 2
    more_eos_ids: tuple[int, ...] = ()  # Llama 3 has several
    pad_token_id: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    is_rotated: bool = False  # as in VisionConfig

    def __post_init__(self) -> None:
        require_positive(self, "llm_config", but=("bos_token_id", "eos_token_id", "pad_token_id"))
        require_divisible(self.hidden_size, self.num_attention_heads, "llm_config")
        require_divisible(self.num_attention_heads, self.num_key_value_heads, "llm_config")
        require_choice("llm_config.hidden_act", self.hidden_act, ("silu",))
        require_choice("llm_config.rope_scaling", self.rope_type, tuple(ROPE_TYPES))
        if self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError(
                "llm_config.rope_scaling: expected low_freq_factor below high_freq_factor, found "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"llm_config: rotary embedding needs an even head size, found {self.head_dim}"
            )
        if self.attention_bias or self.mlp_bias:
            raise CheckpointError(
                "llm_config: expected linear layers without bias, as LLaMA's are, found "
                f"attention_bias {self.attention_bias}, mlp_bias {self.mlp_bias}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """The configuration of an InternVL-Chat without its vision tower (docs/model.md, section 4)."""

    llama: LlamaConfig | None  # None: a language model that is not a LLaMA
    architecture: str = SUPPORTED[0]  # of the language model
    language_width: int = 4096  # D
    layout: Layout = "internvl_chat"
    image_size: int = 448  # the resolution that the vision tower runs at
    downsample_ratio: float = 0.5  # of the grid's sides; 1 where nothing is shuffled
    ps_version: str = "v1"
    template: str = "Hermes-2"
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    pad2square: bool = False
    image_token_id: int | None = None  # id of placeholders for image tokens; None: not known
    # V1.0 with QLLaMA: the image tokens that are its queries, and the vision tower's blocks after
    # select_layer, whose output they attend to
    num_queries: int = 0
    num_blocks_behind: int = 0

    def __post_init__(self) -> None:
        may_be_none = ("image_token_id", "num_queries", "num_blocks_behind")
        require_positive(self, "config", but=may_be_none)
        require_choice("ps_version", self.ps_version, ("v1", "v2"))
        if self.llama is not None:
            require_choice("template", self.template, tuple(TEMPLATES))
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise CheckpointError(
                "config: expected min_dynamic_patch up to max_dynamic_patch, found "
                f"{self.min_dynamic_patch} and {self.max_dynamic_patch}"
            )

    @property
    def projector(self) -> str:
        """The projector's name in a checkpoint."""
        return "mm_projector" if self.layout == "llava" else "mlp1"

    @property
    def unsupported(self) -> str:
        """The message about a language model that is not a LLaMA."""
        return (
            f"{self.architecture}; supported are LLaMA language models (LlamaForCausalLM, as in "
            "InternVL-Chat V1-1 and V1-2, and LLaVA's, as in V1.0)"
        )

    @property
    def shuffle(self) -> int:
        """The s of pixel shuffle: s by s patches become one image token."""
        return round(1 / self.downsample_ratio)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ChatConfig:
        """Invert ``dataclasses.asdict``; unknown keys are refused."""
        llama = raw["llama"]
        if llama is not None:
            more = tuple(llama.get("more_eos_ids", ()))
            llama = LlamaConfig(**{**llama, "more_eos_ids": more})
        return cls(**{**raw, "llama": llama})


def is_llava(raw: dict[str, Any]) -> bool:
    """Tell whether a config has the LLaVA layout."""
    return "mm_vision_tower" in raw or LLAVA_ARCHITECTURE in (raw.get("architectures") or ())


def has_queries(raw: dict[str, Any]) -> bool:
    """Tell whether a LLaVA config is that of V1.0 with QLLaMA, which has query tokens too."""
    return raw.get("mm_projector_type") == QUERY_PROJECTOR


def used_depth(select_layer: int, depth: int, path: Path) -> int:
    """Count the blocks before ``hidden_states[select_layer]``; index 0 is the embeddings.

    Raises:
        CheckpointError: there is no such layer.
    """
    used = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= used <= depth:
        raise CheckpointError(
            f"{path}: select_layer {select_layer}: expected a layer of a tower of {depth} blocks"
        )
    return used


def read_chat(raw: dict[str, Any], path: Path) -> tuple[ChatConfig, int]:
    """Read the chat part of an ``internvl_chat`` config, and its ``select_layer``.

    Raises:
        CheckpointError: a value is invalid.
    """
    llm = section(raw, "llm_config", path)
    name = _architecture(llm)
    vision = section(raw, "vision_config", path)
    size = raw.get("force_image_size") or vision.get("image_size") or 448
    skip = (
        "llama",
        "architecture",
        "language_width",
        "layout",
        "image_size",
        "image_token_id",
        "num_queries",
        "num_blocks_behind",
    )
    config = ChatConfig(
        llama=_llama(llm, path, "llm_config.") if name in SUPPORTED else None,
        architecture=name,
        language_width=typed(llm.get("hidden_size", 4096), int, path, "llm_config.hidden_size"),
        image_size=typed(size, int, path, "force_image_size"),
        image_token_id=find_token_id(path.parent, IMAGE_TOKEN),
        **known_fields(ChatConfig, raw, path, "", skip=skip),
    )
    if config.downsample_ratio not in (1.0, 0.5, 0.25):
        raise CheckpointError(
            f"{path}: downsample_ratio must be 1, 0.5 or 0.25, found {config.downsample_ratio}"
        )
    return config, typed(raw.get("select_layer", -4), int, path, "select_layer")


def read_llava(raw: dict[str, Any], path: Path) -> tuple[ChatConfig, int]:
    """Read the chat part of a ``llava`` config, and its ``select_layer``.

    Raises:
        CheckpointError: a value is invalid, or the projector does not consist of two-layer MLPs.
    """
    kind, feature = raw.get("mm_projector_type"), raw.get("mm_vision_select_feature", "patch")
    is_known = kind in (LLAVA_PROJECTOR, QUERY_PROJECTOR) and feature == "patch"
    if not is_known or raw.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{path}: expected mm_projector_type {LLAVA_PROJECTOR} or {QUERY_PROJECTOR}, "
            "mm_vision_select_feature patch and mm_use_im_start_end false, found "
            f"{kind}, {feature} and {raw.get('mm_use_im_start_end')}"
        )
    is_small = "448" not in str(raw.get("mm_vision_tower"))
    size = raw.get("image_size") or (LLAVA_224_SIZE if is_small else 448)
    llama = _llama(raw, path, "")
    config = ChatConfig(
        llama=llama,
        architecture=LLAVA_ARCHITECTURE,
        language_width=llama.hidden_size,
        layout="llava",
        image_size=typed(size, int, path, "image_size"),
        downsample_ratio=1.0,
        template="vicuna_v1",
        pad2square=raw.get("image_aspect_ratio", "pad") == "pad",
        image_token_id=LLAVA_IMAGE_TOKEN_ID,
    )
    return config, typed(raw.get("mm_vision_select_layer", -4), int, path, "mm_vision_select_layer")


def find_token_id(directory: Path, token: str) -> int | None:
    """Find the id of an added token in a checkpoint's tokenizer files; None if it is not there."""
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = directory / name
        if not is_there(path):
            continue
        try:
            raw = read_json(path)
            decoder = raw.get("added_tokens_decoder", {})
            ids = {entry["content"]: int(i) for i, entry in decoder.items()}
            token_id = ids.get(token, raw.get(token))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a list of added tokens: {error}") from error
        if token_id is not None:
            return typed(token_id, int, path, token)  # type: ignore[no-any-return]
    return None


def _architecture(llm: dict[str, Any]) -> str:
    names = llm.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return SUPPORTED[0] if llm.get("model_type") == "llama" else str(llm.get("model_type"))


def _llama(raw: dict[str, Any], path: Path, prefix: str) -> LlamaConfig:
    rope = ("rope_type", "rope_factor", "low_freq_factor", "high_freq_factor")
    skip = (
        *rope,
        "rope_theta",
        "original_max_position_embeddings",
        "is_rotated",
        "eos_token_id",
        "more_eos_ids",
    )
    fields = known_fields(LlamaConfig, raw, path, prefix, skip=skip)
    fields |= _ends(raw.get("eos_token_id"), path, f"{prefix}eos_token_id")
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", 32))
    head_dim = raw.get("head_dim")
    llama = LlamaConfig(**fields, **_rope(raw, path, prefix))
    if head_dim not in (None, llama.head_dim):
        raise CheckpointError(
            f"{path}: {prefix}head_dim: expected hidden_size / num_attention_heads = "
            f"{llama.head_dim}, found {head_dim!r}"
        )
    return llama


def _ends(ids: Any, path: Path, key: str) -> dict[str, Any]:
    """Read the ids that end a text: one, or a list of them."""
    if ids is None:
        return {}
    listed = ids if isinstance(ids, list) and ids else [ids]
    first, *more = (typed(token, int, path, key) for token in listed)
    return {"eos_token_id": first, "more_eos_ids": tuple(more)}


def _rope(raw: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    """Read rotary positions from a config, under their current or former keys."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path}: {prefix}rope_scaling must be an object, found {scaling!r}")
    numbers = {
        "rope_theta": scaling.get("rope_theta", raw.get("rope_theta")),
        "rope_factor": scaling.get("factor"),
        **{key: scaling.get(key) for key in ("low_freq_factor", "high_freq_factor")},
    }
    fields = {
        key: typed(value, float, path, f"{prefix}rope_scaling.{key}")
        for key, value in numbers.items()
        if value is not None
    }
    original = scaling.get("original_max_position_embeddings")
    if original is not None:
        fields["original_max_position_embeddings"] = typed(
            original, int, path, f"{prefix}rope_scaling.original_max_position_embeddings"
        )
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    missing = [key for key in ROPE_TYPES.get(kind, ()) if scaling.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{path}: {prefix}rope_scaling: {kind} needs {', '.join(missing)}, found none"
        )
    return {"rope_type": kind, **fields}
