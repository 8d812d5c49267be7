"""The demo's SentencePiece model, laid out as LLaMA's: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, bytes.

Byte pieces give every text ids, and nothing is normalised, so that decoding is exact. The words
of the demo are whole pieces.
"""

from __future__ import annotations

import io
import string
from pathlib import Path

import sentencepiece as spm

from internvl_edge.demo.language import corpus

VOCAB_SIZE = 480


def train_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """Train on the demo's sentences and write the model to ``path``; always the same bytes."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        required_chars=string.ascii_letters + string.digits,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_proto=model.getvalue())
