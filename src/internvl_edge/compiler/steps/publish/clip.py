"""The files by which transformers' and optimum's classes for CLIP open a directory."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from internvl_edge.artifact.components import EMBEDDERS, JOINED_GRAPH
from internvl_edge.compiler.cost import Cost
from internvl_edge.compiler.oracle.joined import require_joined
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.publish.clip_settings import (
    model_settings,
    picture_settings,
    special_tokens,
    tokenizer_settings,
)
from internvl_edge.compiler.steps.publish.fast_tokenizer import differing, fast_tokenizer
from internvl_edge.compiler.steps.publish.joined_graph import join_towers
from internvl_edge.compiler.steps.step import Build
from internvl_edge.errors import CheckpointError, UsageError, shortened
from internvl_edge.export.checkpoint.side_files import read_side_file
from internvl_edge.export.compare import sample_feeds
from internvl_edge.files.packages import require

logger = logging.getLogger(__name__)

FAST, PIECES = "tokenizer.json", "tokenizer.model"
ADDED = "added_tokens.json"  # of transformers' slow tokenizer, which nothing here reads


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteClip:
    """Join both towers in one graph, and write the settings that it is opened with."""

    whole: bool  # the graph is compared with what it is made of

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        """Refuse what such a graph cannot be made of; it costs too little for a row."""
        asked = "--layout optimum"
        missing = [name for name in EMBEDDERS if name not in plan.components]
        if missing:
            raise UsageError(
                f"{asked}: expected {' and '.join(EMBEDDERS)} among the components, found "
                f"{', '.join(plan.components)}; it is for InternVL-C"
            )
        if plan.options.input != "float32":
            raise UsageError(f"{asked} takes normalised values; leave --input uint8 out")
        require("tokenizers")
        _fast(_pieces(plan.checkpoint.path))
        return ()

    def run(self, plan: Plan, build: Build) -> None:
        internvl, directory = plan.checkpoint.config.internvl, build.directory
        assert internvl is not None
        build.report(Progress(step="join", detail=JOINED_GRAPH, done=0, total=1))
        ir.save(join_towers(directory), directory / JOINED_GRAPH)
        if self.whole and plan.options.verify != "none":
            require_joined(directory, sample_feeds(plan.checkpoint.config, plan.image_size))
        fast = _said(_pieces(directory))
        for name, values in {
            "config.json": model_settings(internvl, plan.image_size),
            "preprocessor_config.json": picture_settings(plan.preprocessing),
            FAST: fast,
            "tokenizer_config.json": tokenizer_settings(fast),
            "special_tokens_map.json": special_tokens(fast),
        }.items():
            text = json.dumps(values, indent=None if name == FAST else 2, ensure_ascii=False)
            (directory / name).write_text(text + "\n", encoding="utf-8")
        (directory / ADDED).unlink(missing_ok=True)


def _pieces(folder: Path) -> bytes:
    pieces = read_side_file(folder, PIECES)
    if pieces is None:
        raise CheckpointError(
            f"{folder}: expected {PIECES}, which {FAST} is made of, found none; put the model's "
            "there, or leave --layout out"
        )
    return pieces


def _fast(pieces: bytes) -> dict[str, Any]:
    return fast_tokenizer(pieces, PIECES)


def _said(pieces: bytes) -> dict[str, Any]:
    """Make the tokenizer, and warn of texts that it splits elsewhere than the runtime's does."""
    fast = _fast(pieces)
    if others := differing(fast, pieces):
        logger.warning(
            "%s gives other ids than the runtime for texts such as %s (%d of those compared): "
            "pieces of this vocabulary share a score, which it cannot say; give the model ids of "
            "%s for such texts",
            FAST,
            shortened(others[0]),
            len(others),
            PIECES,
        )
    return fast
