"""The shapes of a model, read from a checkpoint's ``config.json`` into frozen dataclasses.

A published config is a dump of everything its training framework knows. Only the keys that
decide the computation are read here, and their types are checked; the rest is ignored. Nothing
that a config names is ever imported or executed.

A checkpoint is one of three kinds, recognised by the config's keys rather than by ``model_type``
(which transformers' own, different InternVL shares):

    internvl   ``vision_config`` and ``qllama_config``          InternVL-14B: ViT, QLLaMA, heads
    chat       ``vision_config`` and ``llm_config``, or       InternVL-Chat: ViT, projector, LLM
               ``text_config``, or LLaVA's
    vit        ``model_type`` intern_vit_6b, or a bare ViT      InternViT
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from internvl_edge.artifact.components import components_of
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.config.chat import (
    ChatConfig,
    has_queries,
    is_llava,
    read_chat,
    read_llava,
    used_depth,
)
from internvl_edge.export.config.fields import (
    known_fields,
    read_json,
    refuse_remote_code,
    require_choice,
    require_divisible,
    require_positive,
    section,
    typed,
)
from internvl_edge.export.config.language import OURS as OURS_OF_LANGUAGE
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.config.native import is_native, native_vision, read_native
from internvl_edge.export.config.prompts import find_pad_id, find_system, find_template_name

logger = logging.getLogger(__name__)

Kind = Literal["internvl", "chat", "vit"]
# Fields that no config.json decides.
OURS = ("has_layer_scale", "has_shift", *OURS_OF_LANGUAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The configuration of InternViT (docs/model.md, section 1.1)."""

    hidden_size: int = 3200  # C
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    num_hidden_layers: int = 48
    patch_size: int = 14
    image_size: int = 224  # the resolution of the stored position embedding
    num_channels: int = 3
    qkv_bias: bool = False
    qk_normalization: bool = True  # RMSNorm of q and k over the full width, before the heads
    norm_type: str = "rms_norm"  # or layer_norm (the 300M kind)
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 0.1  # LayerScale at initialisation
    hidden_act: str = "gelu"
    # The form of a tower that is folded for quantization; see ``quantize.fold``.
    has_layer_scale: bool = True  # False: it is part of proj and fc2
    is_rotated: bool = False  # the residual stream is in another basis until it leaves the tower
    # The input of fc2 is scaled by a factor per channel and shifted, to be symmetric about zero.
    has_shift: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "vision_config")
        require_divisible(self.hidden_size, self.num_attention_heads, "vision_config")
        require_choice("vision_config.norm_type", self.norm_type, ("rms_norm", "layer_norm"))
        require_choice("vision_config.hidden_act", self.hidden_act, ("gelu",))
        if self.image_size % self.patch_size:
            raise CheckpointError(
                f"vision_config.image_size must be a multiple of patch_size {self.patch_size}, "
                f"found {self.image_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def num_tokens(self, image_size: int | None = None) -> int:
        """Count the tokens N of a square image: its patches and the class token."""
        side = (self.image_size if image_size is None else image_size) // self.patch_size
        return 1 + side * side


@dataclass(frozen=True, slots=True, kw_only=True)
class QLlamaConfig:
    """The configuration of QLLaMA (docs/model.md, section 2.1).

    ``rope_theta``, ``rope_scaling`` and ``num_key_value_heads`` occur in published configs and are
    ignored here as in the original, whose rotary base and head count are fixed.
    """

    hidden_size: int = 4096  # D
    num_attention_heads: int = 32
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    vocab_size: int = 49954
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    tie_word_embeddings: bool = False
    is_rotated: bool = False  # as in VisionConfig

    def __post_init__(self) -> None:
        require_positive(self, "qllama_config", but=("bos_token_id", "pad_token_id"))
        require_divisible(self.hidden_size, self.num_attention_heads, "qllama_config")
        require_choice("qllama_config.hidden_act", self.hidden_act, ("silu",))
        if self.head_dim % 2:
            raise CheckpointError(
                f"qllama_config: rotary embedding needs an even head size, found {self.head_dim} "
                f"(hidden_size {self.hidden_size} / {self.num_attention_heads} heads)"
            )

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """False: like the next one, something that other families have (``language``)."""
        return False

    @property
    def has_qk_norm(self) -> bool:
        return False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLConfig:
    """The configuration of InternVL-C/-G: towers, pools and heads (docs/model.md, section 3.1)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qllama: QLlamaConfig = field(default_factory=QLlamaConfig)
    clip_embed_dim: int = 768  # E
    attn_pool_num_heads: int = 16
    num_query_token: int = 96
    cross_attention_frequency: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "config")
        require_divisible(self.vision.hidden_size, self.attn_pool_num_heads, "clip_projector")
        require_divisible(self.qllama.hidden_size, self.attn_pool_num_heads, "clip_projector2")

    @classmethod
    def from_json(cls, raw: dict[str, Any] | None) -> InternVLConfig | None:
        """Invert ``dataclasses.asdict``; unknown keys are refused."""
        if raw is None:
            return None
        vision, qllama = VisionConfig(**raw["vision"]), QLlamaConfig(**raw["qllama"])
        return cls(**{**raw, "vision": vision, "qllama": qllama})


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint's kind and the configuration of its models."""

    kind: Kind
    vision: VisionConfig  # for a chat model, only the blocks before select_layer
    internvl: InternVLConfig | None = None
    chat: ChatConfig | None = None
    queries: InternVLConfig | None = None  # for a chat model with QLLaMA, with the whole tower

    @property
    def image_size(self) -> int:
        """The resolution that the model runs at unless another is requested."""
        return self.vision.image_size if self.chat is None else self.chat.image_size

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CheckpointConfig:
        """Invert :meth:`to_json`; unknown keys are refused."""
        chat = data.get("chat")
        try:
            return cls(
                kind=data["kind"],
                vision=VisionConfig(**data["vision"]),
                internvl=InternVLConfig.from_json(data.get("internvl")),
                chat=None if chat is None else ChatConfig.from_json(chat),
                queries=InternVLConfig.from_json(data.get("queries")),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"invalid model configuration: {error}") from error


def load_config(directory: Path) -> CheckpointConfig:
    """Read ``config.json`` of a checkpoint directory.

    Raises:
        CheckpointError: it is absent, malformed, of an unknown architecture, or needs remote code.
    """
    path = directory / "config.json"
    raw = read_json(path)
    refuse_remote_code(raw, path)
    try:
        config = _read_config(raw, path)
    except CheckpointError as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    if config.chat is None:
        return config
    return replace(config, chat=_with_prompts(config.chat, raw, path))


def _with_prompts(chat: ChatConfig, raw: dict[str, Any], path: Path) -> ChatConfig:
    """Add what the files say of prompts; the layout ``internvl_hf`` has its template in one."""
    return replace(
        chat,
        template=chat.template or find_template_name(path.parent),
        system=find_system(raw, path),
        padding_id=find_pad_id(path.parent),
    )


def _read_config(raw: dict[str, Any], path: Path) -> CheckpointConfig:
    nested_vision = raw.get("vision_config")
    if is_llava(raw):  # first, since it may have the config of its tower
        vision, (chat, select_layer) = _llava_vision(raw, path), read_llava(raw, path)
        if has_queries(raw):
            return _chat_with_queries(raw, vision, chat, select_layer, path)
        return _chat(vision, chat, select_layer, path)
    if is_native(raw):
        native = native_vision(raw, path)
        return _chat(_vision_config(native, path, {}), *read_native(raw, native, path), path)
    if isinstance(raw.get("qllama_config"), dict):
        if raw.get("tie_word_embeddings"):
            logger.warning(
                "%s: ignoring tie_word_embeddings at the top level, which would make a loader "
                "overwrite one of two different tensors; lm_head and embed_tokens are both kept",
                path,
            )
        vision = _vision_config(section(raw, "vision_config", path), path, raw)
        return CheckpointConfig(
            kind="internvl", vision=vision, internvl=_internvl(raw, vision, path)
        )
    if isinstance(raw.get("llm_config"), dict) and isinstance(nested_vision, dict):
        return _chat(_vision_config(nested_vision, path, {}), *read_chat(raw, path), path)
    if isinstance(nested_vision, dict) and raw.get("model_type") != "internvl":
        return CheckpointConfig(kind="vit", vision=_vision_config(nested_vision, path, raw))
    if raw.get("model_type") == "intern_vit_6b":
        return CheckpointConfig(kind="vit", vision=_vision_config(raw, path, raw))
    raise CheckpointError(
        f"{path}: expected an InternViT, InternVL (vision_config and qllama_config) or "
        f"InternVL-Chat configuration, found model_type {raw.get('model_type')!r}, "
        f"architectures {raw.get('architectures')!r}; remote code is never run"
    )


def available_components(config: CheckpointConfig) -> tuple[str, ...]:
    """List the components that a checkpoint can be compiled into."""
    if config.chat is None:
        return components_of(config.kind)
    parts = {"num_queries": config.queries, "llama": config.chat.llama}
    return components_of(config.kind, [key for key, part in parts.items() if part is not None])


def check_image_size(config: CheckpointConfig, image_size: int | None) -> int:
    """Return the resolution to compile for: ``image_size``, or the checkpoint's own.

    Raises:
        UsageError: it is not a positive multiple of the patch size.
    """
    size = config.image_size if image_size is None else image_size
    # a chat model merges neighbouring patches into one token
    step = config.vision.patch_size * (1 if config.chat is None else config.chat.shuffle)
    if size <= 0 or size % step:
        lower = max(size // step, 1) * step
        unit = "the patch size" if step == config.vision.patch_size else "the merged patch size"
        raise UsageError(
            f"image size must be a positive multiple of {unit} {step}, found {size}; the nearest "
            f"are {lower} and {lower + step}"
        )
    return size


def _chat(
    vision: VisionConfig, chat: ChatConfig, select_layer: int, path: Path
) -> CheckpointConfig:
    """Cut the tower at ``select_layer``: the blocks after it do not run."""
    depth = used_depth(select_layer, vision.num_hidden_layers, path)
    return CheckpointConfig(kind="chat", vision=replace(vision, num_hidden_layers=depth), chat=chat)


def _chat_with_queries(
    raw: dict[str, Any], vision: VisionConfig, chat: ChatConfig, select_layer: int, path: Path
) -> CheckpointConfig:
    """Keep the tower's last blocks for the queries, which attend to the whole tower's output."""
    cut = _chat(vision, chat, select_layer, path)
    # InternVL-14B's defaults, unless a nested config overrides them; its pools are not used, so one
    # head, which divides every width, will do
    queries = _internvl({"qllama_config": {}, **raw, "attn_pool_num_heads": 1}, vision, path)
    remaining = vision.num_hidden_layers - cut.vision.num_hidden_layers
    chat = replace(chat, num_queries=queries.num_query_token, num_blocks_behind=remaining)
    return replace(cut, chat=chat, queries=queries)


def _llava_vision(raw: dict[str, Any], path: Path) -> VisionConfig:
    """Return the tower a LLaVA config names, an InternViT-6B, or that of a ``vision_config``."""
    name, nested = str(raw.get("mm_vision_tower")), raw.get("vision_config")
    if isinstance(nested, dict):
        return _vision_config(nested, path, {})
    is_newer = any(version in name for version in ("V1-2", "V1-5"))
    size = 448 if "448" in name else 224
    return VisionConfig(image_size=size, num_hidden_layers=45 if is_newer else 48)


def _internvl(raw: dict[str, Any], vision: VisionConfig, path: Path) -> InternVLConfig:
    # Like the original constructor, let the top-level query count and frequency override others.
    qllama = section(raw, "qllama_config", path)
    return InternVLConfig(
        vision=vision,
        qllama=_from_raw(QLlamaConfig, qllama, path, "qllama_config."),
        **known_fields(InternVLConfig, raw, path, "", skip=("vision", "qllama")),
    )


def _vision_config(section: dict[str, Any], path: Path, top: dict[str, Any]) -> VisionConfig:
    if section.get("use_moe"):
        raise CheckpointError(
            f"{path}: vision_config.use_moe: expected false, as in every published tower; mixtures "
            "of experts are not implemented"
        )
    config = _from_raw(VisionConfig, section, path, "vision_config.")
    # A checkpoint made with force_image_size stores a position embedding that is already resized.
    forced = top.get("force_image_size")
    return (
        config
        if forced is None
        else dataclasses.replace(config, image_size=typed(forced, int, path, "force_image_size"))
    )


def published_fields(config: VisionConfig | QLlamaConfig | LanguageConfig) -> dict[str, Any]:
    """Return the fields that a ``config.json`` has, without those that folding sets."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in OURS}


_C = TypeVar("_C", VisionConfig, QLlamaConfig)


def _from_raw(cls: type[_C], raw: dict[str, Any], path: Path, prefix: str) -> _C:
    return cls(**known_fields(cls, raw, path, prefix, skip=OURS))


def with_depth(
    config: CheckpointConfig, vision: int, language: int, queries: int | None = None
) -> CheckpointConfig:
    """Change the numbers of blocks and keep the widths.

    Args:
        config: of a checkpoint.
        vision: number of blocks of the vision tower.
        language: number of the language model's, if there is one.
        queries: number of a chat model's QLLaMA, if it has one; None leaves it unchanged.
    """
    tower = replace(config.vision, num_hidden_layers=vision)
    if config.queries is not None and queries is not None:
        llama = replace(config.queries.qllama, num_hidden_layers=queries)
        config = replace(config, queries=replace(config.queries, qllama=llama))
    if config.chat is not None and config.chat.llama is not None:
        chat = replace(config.chat, llama=replace(config.chat.llama, num_hidden_layers=language))
        return replace(config, vision=tower, chat=chat)
    if config.internvl is None:
        return replace(config, vision=tower)
    llama = replace(config.internvl.qllama, num_hidden_layers=language)
    internvl = replace(config.internvl, vision=tower, qllama=llama)
    return replace(config, vision=tower, internvl=internvl)
