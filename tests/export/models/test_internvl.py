"""The PyTorch reference against the original implementation, and against transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.golden import assert_golden, read_golden
from torch import Tensor
from torch.nn import functional as F

from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.export.models.vit import unrotated
from internvl_edge.quantize.numerics.rotation import rotation

ATOL, LOGITS_ATOL = 1e-5, 5e-5


Reference = dict[str, Tensor]


@pytest.fixture(scope="module")
def ref(golden: Path) -> Reference:
    arrays = read_golden(golden / "tiny" / "reference.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def model(golden: Path) -> InternVL:
    loaded = load_reference(golden / "tiny" / "checkpoint")
    assert isinstance(loaded, InternVL)
    return loaded


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    assert_golden(actual, expected, atol)


def test_vision_tower(model: InternVL, ref: Reference) -> None:
    states = model.vision_model.hidden_states(ref["in.pixel_values"])
    close(torch.stack(states), ref["vit.native.hidden_states"])
    close(states[0], ref["vit.native.embeddings"])
    close(states[-1], ref["vit.native.last_hidden_state"])
    close(states[-1][:, 0], ref["vit.native.pooler_output"])


def test_first_block_piece_by_piece(model: InternVL, ref: Reference) -> None:
    block, x = model.vision_model.encoder.layers[0], ref["vit.native.embeddings"]
    normed = block.norm1(x)
    close(normed, ref["vit.layer0.norm1"])
    attended = block.attn(normed)
    close(attended, ref["vit.layer0.attn_out_before_ls"])
    x = x + block.ls1 * attended
    close(x, ref["vit.layer0.after_attn"])
    close(block.mlp(block.norm2(x)), ref["vit.layer0.mlp_out_before_ls"])


def test_position_embedding_is_resampled(model: InternVL, ref: Reference) -> None:
    from internvl_edge.export.models.vit import resize_position_embedding

    table = model.vision_model.embeddings.position_embedding
    close(resize_position_embedding(table, (6, 6)), ref["vit.interp.position_embedding"])
    pixels = ref["in.pixel_values_interp"]
    close(model.vision_model(pixels), ref["vit.interp.last_hidden_state"])
    close(model.encode_image(pixels), ref["c.interp.image_embed"])
    close(model.encode_image(pixels, "g"), ref["g.interp.image_embed"])


@pytest.mark.parametrize("kind", ["rms", "ln_bias"])
def test_vision_towers_of_the_chat_models(golden: Path, ref: Reference, kind: str) -> None:
    vit = load_reference(golden / "tiny" / f"vit_chat_{kind}")
    assert isinstance(vit, InternViT)
    states = torch.stack(vit.hidden_states(ref["in.pixel_values"]))
    close(states, ref[f"vitchat.{kind}.native.hidden_states"])
    for shape in ("interp", "rect"):
        expected = ref[f"vitchat.{kind}.{shape}.last_hidden_state"]
        close(vit(ref[f"in.pixel_values_{shape}"]), expected)


def test_image_embeddings(model: InternVL, ref: Reference) -> None:
    pixels = ref["in.pixel_values"]
    close(model.encode_image(pixels, "c"), ref["c.image_embed"])
    close(model.encode_image(pixels, "g"), ref["g.image_embed"])
    vision = model.vision_model(pixels)
    close(vision, ref["g.backbone_tokens"])
    queries, _ = model.encode_queries(vision)
    close(queries, ref["g.query_tokens_out"])
    close(model.clip_projector2(queries), ref["g.clip_projector2_out"])


def test_text_embeddings(model: InternVL, ref: Reference) -> None:
    ids, mask = ref["in.text_ids"], ref["in.text_mask"]
    close(model.text_states(ids, mask), ref["text.hidden"])
    close(model.encode_text(ids), ref["text.embed"])
    close(model.encode_text(ref["tok.summarize_ids"]), ref["tok.text_embed"])


@pytest.mark.parametrize("mode", ["c", "g"])
def test_similarity_logits(model: InternVL, ref: Reference, mode: str) -> None:
    image, text = model(ref["in.pixel_values"], ref["in.text_ids"], mode)
    close(image, ref[f"{mode}.logits_per_image"], LOGITS_ATOL)
    close(text, ref[f"{mode}.logits_per_text"], LOGITS_ATOL)


def test_matching(model: InternVL, ref: Reference) -> None:
    # The original scores the first half of a batch with its negatives, the second with positives.
    vision = model.vision_model(ref["train.in.pixel_values"])
    negative, positive = ref["train.in.negative_ids"], ref["train.in.positive_ids"]
    half = len(vision) // 2
    ids = torch.cat((negative[:half], positive[half:]))
    mask = (ids > 0).long()
    states = model.match_states(vision, ids, mask)
    close(states, ref["train.itm.query_states"])
    close(model.itm_head(states), ref["train.itm.per_query_logits"])
    close(model.match(ref["train.in.pixel_values"], ids, mask), ref["train.itm.logits"])


@pytest.mark.parametrize("case", ["lm", "lm_leftpad"])
def test_prefill_and_one_step_of_decoding(model: InternVL, ref: Reference, case: str) -> None:
    padded = case == "lm_leftpad"
    ids = ref["in.prompt_ids_leftpad" if padded else "in.prompt_ids"]
    mask = ref["in.prompt_mask_leftpad"] if padded else torch.ones_like(ids)
    vision = model.vision_model(ref["in.pixel_values"])
    logits, cache = model.prefill(vision, ids, mask)
    close(logits, ref[f"{case}.logits"], LOGITS_ATOL)
    close(torch.stack([key for key, _ in cache]), ref[f"{case}.past_key"])
    close(torch.stack([value for _, value in cache]), ref[f"{case}.past_value"])
    queries = model.config.num_query_token
    full = F.pad(mask, (queries, 1), value=1)
    step, _ = model.decode(ref[f"{case}.next_token"], full, cache)
    close(step, ref[f"{case}.decode_step_logits"], LOGITS_ATOL)
    longer = torch.cat((ids, ref[f"{case}.next_token"]), dim=1)
    again, _ = model.prefill(vision, longer, F.pad(mask, (0, 1), value=1))
    expected = ref[f"{case}.full_recompute_logits"]  # of all positions, or of the last ones
    close(again[:, -expected.shape[1] :], expected, LOGITS_ATOL)


def test_greedy_generation(model: InternVL, ref: Reference) -> None:
    pixels, ids = ref["in.pixel_values"], ref["in.prompt_ids"]
    ones = torch.ones_like(ids)
    expected = ref["gen.greedy_max12"][:, 1:]  # the original puts a BOS in front
    assert torch.equal(model.generate(pixels, ids, ones, 12), expected)
    expected = ref["gen.greedy_min8_max12"][:, 1:]
    assert torch.equal(model.generate(pixels, ids, ones, 12, min_new_tokens=8), expected)
    left, mask = ref["in.prompt_ids_leftpad"], ref["in.prompt_mask_leftpad"]
    expected = ref["gen.greedy_leftpad_max12"][:, 1:]
    assert torch.equal(model.generate(pixels, left, mask, 12), expected)


def test_queries_do_not_depend_on_the_text_that_follows(model: InternVL, ref: Reference) -> None:
    """What lets one component make the image's part of the key/value cache for any prompt."""
    vision, ids = model.vision_model(ref["in.pixel_values"]), ref["in.prompt_ids"]
    _, alone = model.encode_queries(vision)
    _, together = model.prefill(vision, ids, torch.ones_like(ids))
    for (key, value), (long_key, long_value) in zip(alone, together, strict=True):
        count = key.shape[2]
        close(long_key[:, :, :count], key)
        close(long_value[:, :, :count], value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rms", "ln_bias"])
def test_transformers_agrees(golden: Path, ref: Reference, kind: str) -> None:
    """transformers' own InternVL vision model, written independently, on the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    ours = load_reference(golden / "tiny" / f"vit_chat_{kind}")
    c = ours.config
    config = transformers.InternVLVisionConfig(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        intermediate_size=c.intermediate_size,
        image_size=[c.image_size, c.image_size],
        patch_size=[c.patch_size, c.patch_size],
        use_qk_norm=c.qk_normalization,
        attention_bias=c.qkv_bias,
        norm_type=c.norm_type,
        layer_norm_eps=c.layer_norm_eps,
        layer_scale_init_value=c.initializer_factor,
        use_mean_pooling=True,
        use_absolute_position_embeddings=True,
        attn_implementation="eager",
    )
    theirs = InternVLVisionModel(config).eval()
    theirs.load_state_dict(_as_transformers(ours.state_dict()), strict=True)
    for key in ("in.pixel_values", "in.pixel_values_interp", "in.pixel_values_rect"):
        close(theirs(ref[key]).last_hidden_state, ours(ref[key]))


def _as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    table = (
        ("encoder.layers.", "encoder.layer."),
        ("class_embedding", "cls_token"),
        ("position_embedding", "position_embeddings"),
        ("patch_embedding", "patch_embeddings.projection"),
        (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"),
        ("attn.proj", "attention.projection_layer"),
        ("attn.", "attention."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        target = name
        for ours, theirs in table:
            if not (ours == "attn." and "attention." in target):
                target = target.replace(ours, theirs)
        if ".qkv." in target:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[target.replace("qkv", f"{part}_proj")] = third
        else:
            renamed[target] = tensor
    return renamed


def test_a_wide_stream_is_unrotated_by_a_narrow_product() -> None:
    """A massive activation, which float16 does not hold, comes out of a product in float16."""
    q = torch.from_numpy(rotation(96, seed=0).matrix())
    stream = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    stream[0, 1, 7] = 1e6
    rotated = stream @ q
    found = unrotated(rotated, q.half())
    assert found.dtype == torch.float32
    error = (found - stream).norm(dim=-1) / stream.norm(dim=-1)
    assert error.max() < 1e-3
    assert torch.equal(unrotated(rotated, q), rotated @ q)
    assert unrotated(stream, None) is stream
