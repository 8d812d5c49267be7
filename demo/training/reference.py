"""The PyTorch reference with the methods of a loaded model, to evaluate a checkpoint itself.

``python -m internvl_edge.demo.training.reference [CHECKPOINT]`` prints the demo's quality.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from internvl_edge.demo import evaluate
from internvl_edge.demo.language import CAPTION_PROMPT, CONTRASTIVE_PREFIX
from internvl_edge.demo.training.batches import BOS, EOS, pad, pixel_values
from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.models import InternVL
from internvl_edge.runtime.text.padding import left_padded
from internvl_edge.runtime.text.tokenizer import TOKENIZER_FILE

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoint"
BATCH = 100

Floats = NDArray[np.float32]


class ReferenceModel:
    """A checkpoint in float32. Images are HWC uint8 arrays of the canvas's size.

    Raises:
        CheckpointError: not a complete InternVL checkpoint.
    """

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        model = load_reference(checkpoint)
        if not isinstance(model, InternVL):
            raise CheckpointError(f"{checkpoint}: expected an InternVL, found a vision tower")
        self.model = model
        self.tokenizer = spm.SentencePieceProcessor(model_file=str(checkpoint / TOKENIZER_FILE))

    @torch.inference_mode()
    def encode_image(
        self, images: Sequence[Any], mode: str = "c", normalize: bool = False
    ) -> Floats:
        """Embeddings (B, E)."""
        which: Any = mode
        embeds = [self.model.encode_image(pixel_values(part), which) for part in _parts(images)]
        return _embeddings(torch.cat(embeds), normalize)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], normalize: bool = False) -> Floats:
        """Embeddings (B, E)."""
        ids = self._complete([CONTRASTIVE_PREFIX + text for text in texts])
        return _embeddings(self.model.encode_text(ids), normalize)

    @torch.inference_mode()
    def match(self, images: Sequence[Any], texts: Sequence[str]) -> Floats:
        """Return the probability that text i is true of image i, (B,)."""
        chances = []
        for part, of in zip(_parts(images), _parts(texts), strict=True):
            ids = self._complete(of)
            logits = self.model.match(pixel_values(part), ids, (ids > 0).long())  # (B, 2)
            chances.append(logits.softmax(dim=-1)[:, 1])
        return np.asarray(torch.cat(chances).numpy())

    def caption(
        self, images: Sequence[Any], *, num_beams: int = 1, max_new_tokens: int = 30
    ) -> list[str]:
        """Caption greedily; ``num_beams`` must be 1."""
        if num_beams != 1:
            raise ValueError(f"the reference is greedy: num_beams must be 1, found {num_beams}")
        return self.answer(images, [CAPTION_PROMPT] * len(images), max_new_tokens=max_new_tokens)

    def answer(
        self, images: Sequence[Any], prompts: Sequence[str], *, max_new_tokens: int = 30
    ) -> list[str]:
        """Continue prompt i on image i greedily."""
        answers: list[str] = []
        for part, asked in zip(_parts(images), _parts(prompts), strict=True):
            rows = [[BOS, *self.tokenizer.encode(text)] for text in asked]
            ids, mask = map(torch.from_numpy, left_padded(rows))
            new = self.model.generate(pixel_values(part), ids, mask, max_new_tokens)
            answers += [self._decode(row) for row in new.tolist()]
        return answers

    def _complete(self, texts: Sequence[str]) -> Tensor:
        return pad([[BOS, *self.tokenizer.encode(text), EOS] for text in texts])

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode([i for i in ids if i > EOS])
        return text.strip()


def quality(model: Any) -> dict[str, float]:
    """Measure every figure of the demo, by name."""
    measures: dict[str, Callable[[Any], float]] = {
        "zero-shot C": evaluate.zero_shot_accuracy,
        "zero-shot G": lambda m: evaluate.zero_shot_accuracy(m, mode="g"),
        "retrieval R@1 C": evaluate.retrieval_recall_at_1,
        "retrieval R@1 G": lambda m: evaluate.retrieval_recall_at_1(m, mode="g"),
        "matching": evaluate.matching_accuracy,
        "caption exact match": evaluate.caption_exact_match,
        "VQA": evaluate.vqa_accuracy,
    }
    return {name: measure(model) for name, measure in measures.items()}


def _embeddings(embeds: Tensor, normalize: bool) -> Floats:
    return np.asarray((F.normalize(embeds, dim=-1) if normalize else embeds).numpy())


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT
    for name, share in quality(ReferenceModel(given)).items():
        print(f"{name:22} {100 * share:6.1f} %")
