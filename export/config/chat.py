"""A chat model's ``config.json``: its language model, projector and prompts.

Three layouts are published (docs/model.md, section 4):

    internvl_chat   V1-1 to InternVL3.5: ``llm_config`` and ``vision_config``; ``mlp1``
    internvl_hf     the same models as transformers' own class: ``text_config`` (``native``)
    llava           V1.0: a LLaMA's own config with ``mm_*`` keys; ``model.mm_projector``

V1.0 also exists with QLLaMA: its tower is InternVL-14B, whose queries are image tokens as well.

The language model is one of ``language.FAMILIES``. Others are refused by name; the vision side
still compiles on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.fields import (
    known_fields,
    listed,
    require_choice,
    require_positive,
    section,
    typed,
)
from internvl_edge.export.config.language import (
    FAMILIES,
    LLAMA,
    LLAVA,
    LanguageConfig,
    family_name,
    read_language,
)
from internvl_edge.export.config.prompts import find_token_id
from internvl_edge.runtime.images.sources import MAX_TILES
from internvl_edge.runtime.text.templates import TEMPLATES

Layout = Literal["internvl_chat", "internvl_hf", "llava"]

IMAGE_TOKEN = "<IMG_CONTEXT>"
LLAVA_IMAGE_TOKEN_ID = -200
LLAVA_PROJECTOR = "mlp2x_gelu"
QUERY_PROJECTOR = "two_mlp"  # one MLP for patches, one for QLLaMA's queries
LLAVA_224_SIZE = 336  # the resolution that the 224 px tower runs at
NOT_IN_CONFIG = (  # fields of ChatConfig that no key of an internvl_chat config decides
    "llama",
    "architecture",
    "language_width",
    "layout",
    "image_size",
    "image_token_id",
    "num_queries",
    "num_blocks_behind",
    "system",
    "padding_id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatConfig:
    """The configuration of an InternVL-Chat without its vision tower (docs/model.md, section 4)."""

    llama: LanguageConfig | None  # None: a language model of no known family
    architecture: str = LLAMA  # of the language model
    language_width: int = 4096  # D
    layout: Layout = "internvl_chat"
    image_size: int = 448  # the resolution that the vision tower runs at
    downsample_ratio: float = 0.5  # of the grid's sides; 1 where nothing is shuffled
    ps_version: str = "v1"
    template: str = "Hermes-2"  # empty in the layout internvl_hf, whose config names none
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    pad2square: bool = False
    image_token_id: int | None = None  # id of placeholders for image tokens; None: not known
    # V1.0 with QLLaMA: the image tokens that are its queries, and the vision tower's blocks after
    # select_layer, whose output they attend to
    num_queries: int = 0
    num_blocks_behind: int = 0
    system: str | None = None  # the checkpoint's own system sentence; None: the template's
    padding_id: int | None = None  # what rows of ids are padded with; None: not known

    def __post_init__(self) -> None:
        may_be_none = ("image_token_id", "num_queries", "num_blocks_behind", "padding_id")
        require_positive(self, "config", but=may_be_none)
        require_choice("ps_version", self.ps_version, ("v1", "v2"))
        if self.llama is not None and self.layout != "internvl_hf":
            require_choice("template", self.template, tuple(TEMPLATES))
        if self.max_dynamic_patch > MAX_TILES:
            raise CheckpointError(
                f"config: max_dynamic_patch: expected at most {MAX_TILES} tiles of an image, found "
                f"{self.max_dynamic_patch}"
            )
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise CheckpointError(
                "config: expected min_dynamic_patch up to max_dynamic_patch, found "
                f"{self.min_dynamic_patch} and {self.max_dynamic_patch}"
            )

    @property
    def projector(self) -> str:
        """The projector's name in a checkpoint."""
        return "mm_projector" if self.layout == "llava" else "mlp1"

    def of_graphs(self, *, has_language: bool) -> ChatConfig:
        """Leave out what no graph depends on: prompts, tiles, names; or the language model too."""
        return ChatConfig(
            llama=self.llama if has_language else None,
            language_width=self.language_width,
            downsample_ratio=self.downsample_ratio,
            ps_version=self.ps_version,
            num_queries=self.num_queries,
            num_blocks_behind=self.num_blocks_behind,
        )

    @property
    def unsupported(self) -> str:
        """The message about a language model of no known family."""
        is_mixture = any(word in self.architecture for word in ("Moe", "GptOss", "Mixtral"))
        what = ", a mixture of experts" if is_mixture else ""
        return (
            f"{self.architecture}{what}; supported are {', '.join(FAMILIES)}: the dense models "
            "from V1.0 to InternVL3.5"
        )

    @property
    def shuffle(self) -> int:
        """The s of pixel shuffle: s by s patches become one image token."""
        return round(1 / self.downsample_ratio)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ChatConfig:
        """Invert ``dataclasses.asdict``; unknown keys are refused."""
        llama = raw["llama"]
        return cls(**{**raw, "llama": None if llama is None else LanguageConfig.from_json(llama)})


def is_llava(raw: dict[str, Any]) -> bool:
    """Tell whether a config has the LLaVA layout."""
    names = listed(raw.get("architectures"))
    return "mm_vision_tower" in raw or LLAVA in names


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
    name = family_name(llm, path, "llm_config")
    _refuse_relatives(raw, name, path)
    vision = section(raw, "vision_config", path)
    size = raw.get("force_image_size") or vision.get("image_size") or 448
    message = raw.get("system_message")
    config = ChatConfig(
        llama=read_tied(raw, llm, name, path, "llm_config."),
        architecture=name,
        language_width=typed(llm.get("hidden_size", 4096), int, path, "llm_config.hidden_size"),
        image_size=typed(size, int, path, "force_image_size"),
        image_token_id=find_token_id(path.parent, IMAGE_TOKEN),
        system=None if message is None else typed(message, str, path, "system_message"),
        **known_fields(ChatConfig, raw, path, "", skip=NOT_IN_CONFIG),
    )
    if config.downsample_ratio not in (1.0, 0.5, 0.25):
        raise CheckpointError(
            f"{path}: downsample_ratio must be 1, 0.5 or 0.25, found {config.downsample_ratio}"
        )
    # the class of V1-1 and V1-2, which has no ps_version, has another default than the later one
    default = -1 if raw.get("ps_version") is not None else -4
    return config, typed(raw.get("select_layer", default), int, path, "select_layer")


def read_tied(
    top: dict[str, Any], raw: dict[str, Any], name: str, path: Path, prefix: str
) -> LanguageConfig | None:
    """Read the language model, if it is of a known family; either level may say that it is tied."""
    if name not in FAMILIES:
        return None
    flags = [level.get("tie_word_embeddings") or False for level in (raw, top)]
    return read_language({**raw, "tie_word_embeddings": any(flags)}, name, path, prefix)


def _refuse_relatives(raw: dict[str, Any], name: str, path: Path) -> None:
    """Refuse models that share the layout and compute something else."""
    vision = raw["vision_config"]
    towers = listed(vision.get("architectures")) or ["InternVisionModel"]
    if "VE" in name.removesuffix("ForCausalLM") or "InternVisionModel" not in towers:
        raise CheckpointError(
            f"{path}: {name} with {', '.join(map(str, towers))}: a Mono-InternVL, which has no "
            "vision tower; it is not implemented"
        )
    flash = [key for key in raw if key.startswith("flash_")]
    if flash or any("Flash" in str(one) for one in listed(raw.get("architectures"))):
        raise CheckpointError(
            f"{path}: {', '.join(flash) or raw['architectures'][0]}: an InternVL3.5-Flash, whose "
            "router merges image tokens; it is not implemented. The model without Flash is"
        )


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
    llama = read_language(raw, LLAVA, path, "")
    config = ChatConfig(
        llama=llama,
        architecture=LLAVA,
        language_width=llama.hidden_size,
        layout="llava",
        image_size=typed(size, int, path, "image_size"),
        downsample_ratio=1.0,
        template="vicuna_v1",
        pad2square=raw.get("image_aspect_ratio", "pad") == "pad",
        image_token_id=LLAVA_IMAGE_TOKEN_ID,
    )
    return config, typed(raw.get("mm_vision_select_layer", -4), int, path, "mm_vision_select_layer")
