"""Models on the meta device, from which components are traced, and the tables they leave out."""

from __future__ import annotations

import torch

from internvl_edge.artifact.components import QUERIES_PREFIX, VISION_PREFIX
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.weights.layout import towers_of
from internvl_edge.export.checkpoint.load import build_model
from internvl_edge.export.config.checkpoint import CheckpointConfig, with_depth
from internvl_edge.export.graph.repeat import shallow_depth
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.attention import rotary_tables
from internvl_edge.export.models.llama import llama_tables
from internvl_edge.types import Array

AnyModel = InternVL | Chat | InternViT


def shallow_config(config: CheckpointConfig) -> CheckpointConfig:
    """Shorten a model to the blocks that stamping needs to see."""
    depth = {prefix: shallow_depth(n, period) for prefix, (period, n) in towers_of(config).items()}
    queries = depth.pop(QUERIES_PREFIX, None)
    language = next((n for prefix, n in depth.items() if prefix != VISION_PREFIX), 0)
    return with_depth(config, depth[VISION_PREFIX], language, queries)


def shallow_model(plan: Plan) -> AnyModel:
    """Build the model that a plan's components are traced from, without weights."""
    return meta_model(shallow_config(plan.source.config), plan.image_size)


def meta_model(config: CheckpointConfig, image_size: int) -> AnyModel:
    """Build a configuration's model on the meta device, for images of one size."""
    with torch.device("meta"):
        model = build_model(config)
        vision = model if isinstance(model, InternViT) else model.vision_model
        # Resampled once, not in every forward: one graph per resolution.
        tokens = config.vision.num_tokens(image_size)
        vision.embeddings.position_embedding = torch.nn.Parameter(
            torch.empty(1, tokens, config.vision.hidden_size)
        )
    return model


def rotary_constants(config: CheckpointConfig) -> dict[str, Array]:
    """Compute the language model's rotary tables, by the names of its buffers."""
    tables = {}
    if config.chat is not None and config.chat.llama is not None:
        tables["language_model"] = llama_tables(config.chat.llama)
    for name, internvl in (("qllama", config.internvl), ("queries.qllama", config.queries)):
        if internvl is not None:
            llama = internvl.qllama
            tables[name] = rotary_tables(llama.max_position_embeddings, llama.head_dim)
    return {
        f"{name}.rope_{which}": table.numpy()
        for name, pair in tables.items()
        for which, table in zip(("cos", "sin"), pair, strict=True)
    }
