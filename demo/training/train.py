"""Train the demo's InternVL from nothing: ``python -m internvl_edge.demo.training.train OUT``.

One seeded run on the CPU teaches every head at once. Per step and scene, from one pass of the
vision tower (masks and sequence layouts: docs/model.md, section 2.5):

    contrast, C   cosine of clip_projector(tokens) with the text tower
    contrast, G   the same of clip_projector2(queries)
    matching      true caption or near miss, queries and text seeing each other
    generation    caption or answer after [queries | prompt], cross-entropy on the continuation
    patches       which digit, colour and place lie under each patch of the vision tower

The last uses three linear heads that are thrown away afterwards: it is a dense signal from the
drawing itself, and the vision tower starts with it alone. The result is rounded to bfloat16 and
written in the layout of the published checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from internvl_edge.demo.language import COLOURS, DIGITS
from internvl_edge.demo.scenes import CANVAS
from internvl_edge.demo.training.batches import (
    BOS,
    EOS,
    IGNORED,
    NUM_PLACES,
    PATCH,
    Batch,
    TrainingBatches,
)
from internvl_edge.demo.training.tokenizer import VOCAB_SIZE, train_tokenizer
from internvl_edge.export.config.checkpoint import (
    InternVLConfig,
    QLlamaConfig,
    VisionConfig,
    published_fields,
)
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.export.models.qllama import generation_mask
from internvl_edge.runtime.text.tokenizer import TOKENIZER_FILE

MAX_LOGIT_SCALE = math.log(100)
CONFIG = InternVLConfig(
    vision=VisionConfig(
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=512,
        num_hidden_layers=6,
        patch_size=PATCH,
        image_size=CANVAS,
        initializer_factor=0.5,
    ),
    qllama=QLlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=352,
        num_hidden_layers=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
    ),
    clip_embed_dim=64,
    attn_pool_num_heads=4,
    num_query_token=8,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train."""

    vision_steps: int = 450  # of the vision tower alone, which is slow to begin
    steps: int = 1150  # in all
    batch_size: int = 128
    warmup_steps: int = 20
    constant_share: float = 0.45  # of the steps at the full rates; then linearly down to 0
    matrix_rate: float = 0.01  # Muon's learning rate
    other_rate: float = 3e-3  # AdamW's
    weight_decay: float = 0.05
    seed: int = 0
    # With two threads every operation waits for the slower; a busy machine then costs fourfold.
    threads: int = 1
    device: str = "cpu"  # or a GPU, as PyTorch names it
    workers: int = 1  # processes that draw batches


class PatchHeads(nn.Module):
    """Heads that name what lies under each patch; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.digits = nn.Linear(width, len(DIGITS))
        self.colours = nn.Linear(width, len(COLOURS))
        self.places = nn.Linear(width, NUM_PLACES)

    def forward(self, vision: Tensor, batch: Batch) -> Tensor:
        patches = self.norm(vision[:, 1:])  # (B, h·w, C)
        digits = cross_entropy(self.digits(patches), batch.patch_digits)
        colours = cross_entropy(self.colours(patches), batch.patch_colours)
        return digits + colours + cross_entropy(self.places(patches), batch.patch_places)


def initialise(model: InternVL) -> None:
    """Set an untrained InternVL's weights."""
    initialise_layers(model)
    for tensor in (model.vision_model.embeddings.class_embedding, model.query_tokens):
        nn.init.normal_(tensor, std=0.5)
    nn.init.normal_(model.text_projection, std=model.text_projection.shape[0] ** -0.5)
    look_nearby(model.vision_model)


def initialise_layers(model: nn.Module) -> None:
    """Draw weights of deviation 1/√inputs, smaller where a branch joins the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            depth = 4 if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")) else 1
            nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


@torch.no_grad()
def look_nearby(vision: InternViT) -> None:
    """Let every patch attend to its neighbours from the start.

    Digits lie anywhere, and a random tower takes long to find out which patches touch. Waves as
    position embedding make near patches similar, and equal, orthogonal query and key matrices
    make attention follow similarity.
    """
    width, side = vision.config.hidden_size, vision.config.image_size // vision.config.patch_size
    frequency = torch.pi / side * 2 ** torch.linspace(0, 2.3, width // 4)
    angle = (torch.arange(side) + 0.5)[:, None] * frequency
    wave = 0.5 * torch.cat((angle.sin(), angle.cos()), dim=-1)  # (side, C / 2)
    grid = torch.cat(
        (wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)), dim=-1
    )  # (side, side, C)
    table = vision.embeddings.position_embedding
    table.copy_(F.pad(grid.flatten(0, 1), (0, 0, 1, 0))[None])
    for name, weight in vision.named_parameters():
        if name.endswith("attn.qkv.weight"):
            both = nn.init.orthogonal_(torch.empty(width, width))
            weight[: 2 * width] = torch.cat((both, both))


def losses(
    model: InternVL, heads: PatchHeads, batch: Batch, *, vision_only: bool = False
) -> dict[str, Tensor]:
    """Compute each task's mean loss on one batch; with ``vision_only`` the patches' alone."""
    vision = model.vision_model(batch.pixels)  # (B, N, C)
    if vision_only:
        return {"patches": heads(vision, batch)}
    logits, queries = generation(model, vision, batch.generated_ids)
    text = F.normalize(model.encode_text(batch.text_ids).float(), dim=-1)
    match = model.match_tokens(vision, batch.match_ids, (batch.match_ids > 0).long())
    return {
        "contrast_c": contrast(model, model.clip_projector(vision), text, batch.positives),
        "contrast_g": contrast(model, model.clip_projector2(queries), text, batch.positives),
        "match": cross_entropy(match, batch.is_match),
        "generate": cross_entropy(logits[:, :-1], batch.generated_labels[:, 1:]),
        "patches": heads(vision, batch),
    }


def generation(model: InternVL, vision: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits (B, T, V) of the text after the queries, and query states (B, nq, D)."""
    count = model.query_tokens.shape[1]
    queries = model.query_tokens.expand(len(ids), -1, -1)
    embeds = torch.cat((queries, model.qllama.embed(ids)), dim=1)
    mask = generation_mask(F.pad((ids > 0).long(), (count, 0), value=1), count)
    hidden, _ = model.qllama(embeds, mask, vision=vision, num_queries=count)
    return model.qllama.logits(hidden[:, count:]), hidden[:, :count]


def contrast(model: InternVL, image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Compute cross-entropy both ways; a row's target is spread over all that is true of it."""
    image = F.normalize(image.float(), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T  # (images, texts)
    target = positives.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def train(plan: Plan, out: Path) -> None:
    """Train by ``plan`` and write the checkpoint to ``out``."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(out / TOKENIZER_FILE)
    model = InternVL(CONFIG)
    initialise(model)
    heads = PatchHeads(CONFIG.vision.hidden_size)
    data = TrainingBatches(tokenizer, plan.seed, plan.steps, plan.batch_size)

    def keep_scale() -> None:
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    optimise((model, heads), losses, plan, data, keep_scale)
    save_checkpoint(model, out)


def optimise(
    modules: Sequence[nn.Module],
    losses_of: Callable[..., dict[str, Tensor]],
    plan: Plan,
    data: Dataset[Any],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train modules by ``plan``, and print how far it is.

    Args:
        modules: a model and its heads.
        losses_of: the losses of both on a batch; with ``vision_only`` those of the tower alone.
        plan: how.
        data: batches by number.
        after_step: is called after each step, without gradients.
    """
    device = torch.device(plan.device)
    for module in modules:
        module.to(device)
    named = [pair for module in modules for pair in module.named_parameters()]
    optimizers = optimizers_of(named, plan)
    schedules = [LambdaLR(optimizer, lambda step: rate(step, plan)) for optimizer in optimizers]
    parameters = [parameter for _, parameter in named]
    began = time.perf_counter()
    # PyTorch's fused attention has a slow bfloat16 backward on the CPU.
    kernels = [SDPBackend.MATH] + [SDPBackend.EFFICIENT_ATTENTION] * (device.type != "cpu")
    for step, drawn in enumerate(DataLoader(data, batch_size=None, num_workers=plan.workers)):
        batch = _moved(drawn, device)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(kernels):
            parts = losses_of(*modules, batch, vision_only=step < plan.vision_steps)
        for parameter in parameters:
            parameter.grad = None
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            after_step()
        if step % 20 == 0 or step == plan.steps - 1:
            figures = "  ".join(f"{name} {value.item():.3f}" for name, value in parts.items())
            print(f"{step:5d}  {time.perf_counter() - began:7.1f} s  {figures}", flush=True)


def _moved(batch: Any, device: torch.device) -> Any:
    """Copy a batch, a dataclass of tensors, to a device."""
    return replace(batch, **{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})


def optimizers_of(named: list[tuple[str, nn.Parameter]], plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon, which orthogonalises the momentum, for the matrices of the blocks; AdamW for the rest.

    AdamW alone had not begun to tell the digits apart after the steps that Muon needs to do so.
    """
    inside = (".layers.", "_attn.", "mlp1.")
    blocks = {name for name, p in named if p.ndim == 2 and any(part in name for part in inside)}
    muon = torch.optim.Muon(
        [p for name, p in named if name in blocks],
        lr=plan.matrix_rate,
        weight_decay=plan.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [p for name, p in named if name not in blocks],
        lr=plan.other_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    return [muon, adamw]


def rate(step: int, plan: Plan) -> float:
    """Return the share of the learning rates at a step: up, constant, then linearly down to 0."""
    decay_steps = round(plan.steps * (1 - plan.constant_share))
    return min(1.0, (step + 1) / plan.warmup_steps, max(plan.steps - step, 0) / decay_steps)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


# --- the checkpoint --------------------------------------------------------------------------


def save_checkpoint(model: InternVL, out: Path) -> None:
    """Write weights in bfloat16 and their JSON files, as Hugging Face lays them out."""
    write_checkpoint(model, _documents(model.config), out)


def write_checkpoint(model: nn.Module, documents: dict[str, dict[str, Any]], out: Path) -> None:
    """Write a model's weights in bfloat16, and JSON files by their names."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in documents.items():
        text = json.dumps(content, indent=2, sort_keys=True)
        (out / name).write_text(text + "\n", encoding="utf-8")


def preprocessor(image_size: int) -> dict[str, Any]:
    """Describe how pictures become pixel values, as published models do."""
    return {
        "crop_size": image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": image_size,
    }


def _documents(config: InternVLConfig) -> dict[str, dict[str, Any]]:
    heads = {k: v for k, v in asdict(config).items() if not isinstance(v, dict)}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    untied = {"tie_word_embeddings": False}
    return {
        "config.json": {
            **heads,
            **untied,
            "architectures": ["InternVLModel"],
            "model_type": "internvl",
            "torch_dtype": "bfloat16",
            "vision_config": {
                **published_fields(config.vision),
                **untied,
                "model_type": "intern_vit_6b",
            },
            "qllama_config": {**published_fields(config.qllama), "model_type": "llama"},
        },
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0},
        "preprocessor_config.json": preprocessor(config.vision.image_size),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizer",
        },
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's InternVL on handwritten digits.")
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    options = parser.parse_args()
    train(Plan(), options.out)


if __name__ == "__main__":
    main()
