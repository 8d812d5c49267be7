"""Names and shapes of the parameters that a configuration calls for, in the model's order.

They are those of the PyTorch reference (``export.models``), written a second time: a checkpoint is
opened and judged without PyTorch, and a test holds the two together. The order is that of
``state_dict``: a module's own parameters, then those of the modules in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import (
    CheckpointConfig,
    InternVLConfig,
    QLlamaConfig,
    VisionConfig,
)
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.types import Shape

__all__ = ["expected_shapes"]

Parameters = Iterator[tuple[str, Shape]]


def expected_shapes(config: CheckpointConfig) -> dict[str, Shape]:
    """Map the canonical name of every tensor that a configuration calls for to its shape."""
    if config.kind == "internvl":
        assert config.internvl is not None
        return dict(_internvl(config.internvl))
    if config.kind == "chat":
        assert config.chat is not None
        return dict(_chat(config, config.chat))
    return dict(_within("vision_model", _vision(config.vision)))


def _within(name: str, parameters: Iterable[tuple[str, Shape]]) -> Parameters:
    return ((f"{name}.{inner}", shape) for inner, shape in parameters)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Parameters:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int, *, bias: bool = False) -> Parameters:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _unrotation(width: int, is_rotated: bool) -> Parameters:
    if is_rotated:
        yield "unrotation", (width, width)


# --- models --------------------------------------------------------------------------------------


def _internvl(config: InternVLConfig) -> Parameters:
    width, embed = config.qllama.hidden_size, config.clip_embed_dim
    yield "query_tokens", (1, config.num_query_token, width)
    yield "text_projection", (width, embed)
    yield "logit_scale", ()
    yield from _within("vision_model", _vision(config.vision))
    yield from _within("qllama", _qllama(config))
    yield from _within("clip_projector", _pool(config.vision.hidden_size, embed))
    yield from _within("clip_projector2", _pool(width, embed))
    yield from _linear("itm_head", width, 2)


def _chat(config: CheckpointConfig, chat: ChatConfig) -> Parameters:
    width, language_width = config.vision.hidden_size, chat.language_width
    yield from _within("vision_model", _vision(config.vision))
    projector = _projector(chat, width)
    if config.queries is not None:
        yield from _within("queries", _queries(config.queries, chat.num_blocks_behind))
        of_queries = _mlp(config.queries.qllama.hidden_size, language_width)
        yield from _within(f"{chat.projector}.mlp1", projector)
        yield from _within(f"{chat.projector}.mlp2", of_queries)
    else:
        yield from _within(chat.projector, projector)
    if chat.llama is not None:
        yield from _within("language_model", _llama(chat.llama))


def _vision(config: VisionConfig) -> Parameters:
    width, patch = config.hidden_size, config.patch_size
    yield from _unrotation(width, config.is_rotated)
    yield "embeddings.class_embedding", (1, 1, width)
    yield "embeddings.position_embedding", (1, config.num_tokens(), width)
    yield "embeddings.patch_embedding.weight", (width, config.num_channels, patch, patch)
    yield "embeddings.patch_embedding.bias", (width,)
    for i in range(config.num_hidden_layers):
        yield from _within(f"encoder.layers.{i}", _vision_block(config))


def _vision_block(config: VisionConfig) -> Parameters:
    width, inner = config.hidden_size, config.intermediate_size
    if config.has_layer_scale:
        yield "ls1", (width,)
        yield "ls2", (width,)
    has_bias = config.norm_type == "layer_norm"
    yield from _norm("norm1", width, bias=has_bias)
    yield from _norm("norm2", width, bias=has_bias)
    yield from _linear("attn.qkv", width, 3 * width, bias=config.qkv_bias)
    yield from _linear("attn.proj", width, width)
    if config.qk_normalization:
        yield from _norm("attn.q_norm", width)
        yield from _norm("attn.k_norm", width)
    if config.has_shift:
        yield "mlp.spread", (inner,)
        yield "mlp.shift", ()
    yield from _linear("mlp.fc1", width, inner)
    yield from _linear("mlp.fc2", inner, width)


def _pool(width: int, embed: int) -> Parameters:
    for name in ("norm1_q", "norm1_k", "norm1_v"):
        yield from _norm(name, width, bias=True)
    for name in ("q_bias", "k_bias", "v_bias"):
        yield f"cross_attn.{name}", (width,)
    for name in ("q", "k", "v"):
        yield from _linear(f"cross_attn.{name}", width, width, bias=False)
    yield from _linear("cross_attn.proj", width, embed)


def _queries(config: InternVLConfig, num_blocks: int) -> Parameters:
    """List QLLaMA without its tables of tokens, and the vision blocks whose output it sees."""
    yield "query_tokens", (1, config.num_query_token, config.qllama.hidden_size)
    for i in range(num_blocks):
        yield from _within(f"vision_behind.{i}", _vision_block(config.vision))
    yield from _within("qllama", _qllama(config, has_tokens=False))


def _projector(config: ChatConfig, width: int) -> Parameters:
    """List a two-layer MLP (``nn.Sequential``), after a LayerNorm where patches are merged."""
    if config.layout == "llava":
        yield from _mlp(width, config.language_width)
    else:
        merged = width * config.shuffle**2
        yield from _norm("0", merged, bias=True)
        yield from _mlp(merged, config.language_width, first=1)


def _mlp(width: int, language_width: int, first: int = 0) -> Parameters:
    yield from _linear(f"{first}", width, language_width)
    yield from _linear(f"{first + 2}", language_width, language_width)


# --- language models -----------------------------------------------------------------------------


def _qllama(config: InternVLConfig, *, has_tokens: bool = True) -> Parameters:
    """List a LLaMA some of whose layers look at the image."""
    llama, vision_width = config.qllama, config.vision.hidden_size
    crossed = range(0, llama.num_hidden_layers, config.cross_attention_frequency)
    yield from _within("model", _layers(llama, crossed, vision_width, has_tokens=has_tokens))
    if has_tokens:
        yield from _linear("lm_head", llama.hidden_size, llama.vocab_size, bias=False)


def _llama(config: LanguageConfig) -> Parameters:
    yield from _within("model", _layers(config))
    if not config.tie_word_embeddings:
        yield from _linear("lm_head", config.hidden_size, config.vocab_size, bias=False)


def _layers(
    config: QLlamaConfig | LanguageConfig,
    crossed: Collection[int] = (),
    vision_width: int = 0,
    *,
    has_tokens: bool = True,
) -> Parameters:
    width = config.hidden_size
    yield from _unrotation(width, config.is_rotated)
    if has_tokens:
        yield "embed_tokens.weight", (config.vocab_size, width)
    for i in range(config.num_hidden_layers):
        yield from _within(f"layers.{i}", _layer(config))
        if i in crossed:
            yield from _within(f"layers.{i}.cross_attn", _cross_attention(width, vision_width))
    yield from _norm("norm", width)


def _layer(config: QLlamaConfig | LanguageConfig) -> Parameters:
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * size, config.num_key_value_heads * size
    for name, outputs in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        yield from _linear(f"self_attn.{name}_proj", width, outputs, bias=config.has_qkv_bias)
    yield from _linear("self_attn.o_proj", q_width, width, bias=False)
    if config.has_qk_norm:
        yield from _norm("self_attn.q_norm", size)
        yield from _norm("self_attn.k_norm", size)
    yield from _linear("mlp.gate_proj", width, inner, bias=False)
    yield from _linear("mlp.up_proj", width, inner, bias=False)
    yield from _linear("mlp.down_proj", inner, width, bias=False)
    yield from _norm("input_layernorm", width)
    yield from _norm("post_attention_layernorm", width)


def _cross_attention(width: int, vision_width: int) -> Parameters:
    yield from _norm("norm1", width)
    yield from _norm("norm2", vision_width)
    for name, inputs in (("q", width), ("k", vision_width), ("v", vision_width), ("o", width)):
        yield from _linear(f"{name}_proj", inputs, width, bias=False)
