"""The language model of a chat checkpoint: one configuration for every kind of LLaMA.

Each published InternVL-Chat has one of these language models. All are LLaMAs; a kind differs in
the few things that its row says, and in how its checkpoint packs weights
(``checkpoint.names``):

    LLaMA, Yi, InternLM2, InternLM3, Phi-3    nothing
    Qwen2, Qwen2.5                            biases of q, k and v
    Qwen3                                     RMSNorm of q and k, head by head

The head size is ``head_dim`` where a config has it, and need not be hidden_size / heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.fields import (
    known_fields,
    require_choice,
    require_divisible,
    require_positive,
    typed,
)

__all__ = ["FAMILIES", "Family", "LanguageConfig", "family_name", "read_language"]

LLAMA = "LlamaForCausalLM"
LLAVA = "LlavaLlamaForCausalLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a kind of language model has that LLaMA has not, and what its config may not say."""

    model_type: str
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    head_dim: int = 0  # where the config has none; 0: hidden_size / num_attention_heads
    no_bias: tuple[str, ...] = ("attention_bias", "mlp_bias")  # keys that must be false
    has_window_switch: bool = False  # use_sliding_window says whether sliding_window applies
    has_window: bool = False  # sliding_window applies wherever it is set


FAMILIES: dict[str, Family] = {
    LLAMA: Family(model_type="llama"),
    LLAVA: Family(model_type="llava_llama"),
    "InternLM2ForCausalLM": Family(model_type="internlm2", no_bias=("bias", "attention_bias")),
    "InternLM3ForCausalLM": Family(
        model_type="internlm3", no_bias=("bias", "qkv_bias", "attention_bias", "mlp_bias")
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2", has_qkv_bias=True, no_bias=("mlp_bias",), has_window_switch=True
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3", has_qk_norm=True, head_dim=128, has_window_switch=True
    ),
    "Phi3ForCausalLM": Family(model_type="phi3", has_window=True),
}
# Rotary scaling → the keys that it requires.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": ("short_factor", "long_factor"),
}
ROPE_NAMES = {"su": "longrope"}  # its name before transformers had it
UNKNOWN_SCALING = ("short_mscale", "long_mscale")  # keys of LongRoPE that are not implemented
ORIGINAL_POSITIONS = 4096  # of LongRoPE, where the config does not say
OURS = ("is_rotated", "has_qkv_bias", "has_qk_norm")  # fields that no key decides

NOT_BY_NAME = (  # fields that are not the key of that name
    *OURS,
    "rope_type",
    "rope_factor",
    "rope_theta",
    "rope_attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "eos_token_id",
    "more_eos_ids",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """A LLaMA's configuration with transformers' names, and its rotary scaling in single fields."""

    hidden_size: int = 4096  # D
    num_attention_heads: int = 32
    num_key_value_heads: int = 32  # each is shared by neighbouring query heads
    head_dim: int = 0  # 0 becomes hidden_size / num_attention_heads
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
    original_max_position_embeddings: int = 8192  # of longrope's too
    # Of longrope: divisors of each pair's frequency, up to the original positions and beyond, and
    # the factor of cos and sin at any length
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rope_attention_factor: float = 1.0
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int = 2
    more_eos_ids: tuple[int, ...] = ()  # Llama 3 has several
    pad_token_id: int = 0
    # Whether the token embedding is the output layer. A config's flag alone does not decide that:
    # an output layer that a checkpoint holds is used (``checkpoint.checkpoint``).
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    has_qkv_bias: bool = False  # of q, k and v; o has none
    has_qk_norm: bool = False  # RMSNorm of each head's q and k, before the rotary positions
    is_rotated: bool = False  # as in VisionConfig

    def __post_init__(self) -> None:
        if not self.head_dim:
            require_divisible(self.hidden_size, self.num_attention_heads, "llm_config")
            size = self.hidden_size // self.num_attention_heads
            object.__setattr__(self, "head_dim", size)
        require_positive(self, "llm_config", but=("bos_token_id", "eos_token_id", "pad_token_id"))
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
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                _require_factors(getattr(self, name), self.head_dim // 2, name)

    @property
    def long_positions(self) -> int:
        """The row of the rotary tables where positions of long texts begin; 0: there are no others.

        LongRoPE has other angles for a text of more than ``original_max_position_embeddings``
        positions, at all of its positions. They are further rows of the same tables.
        """
        is_long = self.rope_type == "longrope"
        original = self.original_max_position_embeddings
        return original if is_long and original < self.max_position_embeddings else 0

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> LanguageConfig:
        """Invert ``dataclasses.asdict``; unknown keys are refused."""
        lists = ("more_eos_ids", "short_factor", "long_factor")
        return cls(**{**raw, **{key: tuple(raw.get(key, ())) for key in lists}})


def family_name(raw: dict[str, Any], path: Path, key: str) -> str:
    """Name the architecture of a language model's config; ``model_type`` is a second witness.

    Raises:
        CheckpointError: the two say different things.
    """
    names, kind = raw.get("architectures"), raw.get("model_type")
    known = {family.model_type: name for name, family in FAMILIES.items()}
    if not isinstance(names, list) or not names:
        return known.get(str(kind), str(kind))
    name = str(names[0])
    if name in FAMILIES and known.get(str(kind), name) != name:
        raise CheckpointError(
            f"{path}: {key}: expected one language model, found architectures {name} and "
            f"model_type {kind}"
        )
    return name


def read_language(raw: dict[str, Any], name: str, path: Path, prefix: str) -> LanguageConfig:
    """Read the configuration of a language model of a known family.

    Args:
        raw: its config.
        name: its architecture, a key of ``FAMILIES``.
        path: of the file, for messages.
        prefix: of its keys there, for messages.

    Raises:
        CheckpointError: a value is invalid, or one that is not implemented.
    """
    family = FAMILIES[name]
    _refuse_windows(raw, family, path, prefix)
    _refuse_experts(raw, path, prefix)
    for key in family.no_bias:
        if raw.get(key):
            raise CheckpointError(
                f"{path}: {prefix}{key}: expected false, as in every published {name}, found "
                f"{raw[key]!r}; its linear layers would have biases that are not implemented"
            )
    fields = known_fields(LanguageConfig, raw, path, prefix, skip=NOT_BY_NAME)
    fields |= _ends(raw.get("eos_token_id"), path, f"{prefix}eos_token_id")
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", 32))
    fields.setdefault("head_dim", family.head_dim)
    positions = fields.get("max_position_embeddings", LanguageConfig().max_position_embeddings)
    return LanguageConfig(
        **fields,
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        **_rope(raw, positions, path, prefix),
    )


def _refuse_windows(raw: dict[str, Any], family: Family, path: Path, prefix: str) -> None:
    """Refuse attention that does not see all positions."""
    window, kinds = raw.get("sliding_window"), raw.get("layer_types") or ()
    positions = raw.get("max_position_embeddings", 0)
    is_on = family.has_window_switch and raw.get("use_sliding_window")
    if family.has_window and window is not None:
        is_on = not isinstance(window, int) or window < positions
    others = [kind for kind in kinds if kind != "full_attention"]
    if is_on or others:
        what = f"layer_types {others[0]!r}" if others else f"sliding_window {window!r}"
        raise CheckpointError(
            f"{path}: {prefix}{what}: expected attention to all positions, as in every published "
            "model; sliding windows are not implemented"
        )


def _refuse_experts(raw: dict[str, Any], path: Path, prefix: str) -> None:
    for key in ("moe_config", "num_experts", "num_local_experts"):
        if raw.get(key):
            raise CheckpointError(
                f"{path}: {prefix}{key} {raw[key]!r:.60}: mixtures of experts are not implemented"
            )


def _ends(ids: Any, path: Path, key: str) -> dict[str, Any]:
    """Read the ids that end a text: one, or a list of them."""
    if ids is None:
        return {}
    listed = ids if isinstance(ids, list) and ids else [ids]
    first, *more = (typed(token, int, path, key) for token in listed)
    return {"eos_token_id": first, "more_eos_ids": tuple(more)}


# --- rotary positions ----------------------------------------------------------------------------


def _rope(raw: dict[str, Any], positions: int, path: Path, prefix: str) -> dict[str, Any]:
    """Read rotary positions from a config, under their current or former keys."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
        raise CheckpointError(
            f"{path}: {prefix}rope_scaling must be one object for all layers, found {scaling!r}"
        )
    where = f"{prefix}rope_scaling"
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise CheckpointError(
            f"{path}: {where}.partial_rotary_factor: expected 1, found {partial!r}; rotary "
            "positions of a part of a head are not implemented"
        )
    numbers = {
        "rope_theta": scaling.get("rope_theta", raw.get("rope_theta")),
        "rope_factor": scaling.get("factor"),
        **{key: scaling.get(key) for key in ("low_freq_factor", "high_freq_factor")},
    }
    fields = {
        key: typed(value, float, path, f"{where}.{key}")
        for key, value in numbers.items()
        if value is not None
    }
    key = "original_max_position_embeddings"
    original = scaling.get(key, raw.get(key))
    if original is not None:
        fields[key] = typed(original, int, path, f"{where}.{key}")
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    kind = ROPE_NAMES.get(kind, kind)
    missing = [key for key in ROPE_TYPES.get(kind, ()) if scaling.get(key) is None]
    if missing:
        raise CheckpointError(f"{path}: {where}: {kind} needs {', '.join(missing)}, found none")
    if kind == "longrope":
        fields |= _longrope(scaling, fields.get(key), positions, path, where)
    return {"rope_type": kind, **fields}


def _longrope(
    scaling: dict[str, Any], original: Any, positions: int, path: Path, where: str
) -> dict[str, Any]:
    """Read LongRoPE: both lists of divisors, and the factor of cos and sin.

    With L original positions of P in all, the factor is √(1 + ln(P / L) / ln L).
    """
    unknown = [key for key in UNKNOWN_SCALING if scaling.get(key) is not None]
    if unknown:
        raise CheckpointError(f"{path}: {where}.{unknown[0]}: not implemented, expected none")
    original = original or ORIGINAL_POSITIONS
    given, share = scaling.get("attention_factor"), positions / original
    if given is not None:
        factor = typed(given, float, path, f"{where}.attention_factor")
    else:
        is_longer = share > 1 and original > 1
        factor = math.sqrt(1 + math.log(share) / math.log(original)) if is_longer else 1.0
    lists = {
        key: tuple(
            typed(value, float, path, f"{where}.{key}") for value in _listed(scaling, key, path)
        )
        for key in ("short_factor", "long_factor")
    }
    return {
        "original_max_position_embeddings": original,
        "rope_attention_factor": float(factor),
        **lists,
    }


def _listed(scaling: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = scaling[key]
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: rope_scaling.{key} must be a list, found {value!r:.60}")
    return value


def _require_factors(factors: Sequence[float], count: int, name: str) -> None:
    if len(factors) != count or not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError(
            f"llm_config.rope_scaling.{name}: expected {count} positive factors, one for each pair "
            f"of a head, found {len(factors)}: {list(factors[:4])} …"
        )
