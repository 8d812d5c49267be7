"""Tiny tokenizers of every kind that the chat family has, trained here."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from internvl_edge.runtime.text.bpe_pieces import QWEN_PATTERN
from internvl_edge.runtime.text.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from internvl_edge.runtime.text.token_files import TokenFiles, read_token_files

CORPUS = (
    "system\nuser\nassistant\nThe image shows two cats on a sofa.",
    "a photo of a red panda, and the dog is on the grass",
    "请详细描述这张图片。两只猫是什么颜色？",
    "I'll say it's what they've done: 1, 22, 333!",
)
IMAGE_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def sentencepiece_model(**options: Any) -> bytes:
    """A small SentencePiece model of the kind that LLaMA's is."""
    file = io.BytesIO()
    defaults = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
        "split_digits": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=file, **(defaults | options)
    )
    return file.getvalue()


def rules(text: str, *, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "single_word": False}
    return {"content": text, "special": special, "rstrip": rstrip, **plain}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_config(path: Path, tokens: Mapping[int, dict[str, Any]], **config: Any) -> None:
    decoder = {str(i): token for i, token in tokens.items()}
    write_json(path / "tokenizer_config.json", {"added_tokens_decoder": decoder, **config})


def write_internlm2(path: Path) -> Path:
    """Control tokens rename user-defined pieces ``[UNUSED_TOKEN_…]``."""
    path.mkdir(parents=True, exist_ok=True)
    unused = [f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)]
    data = sentencepiece_model(user_defined_symbols=unused, add_dummy_prefix=False)
    (path / "tokenizer.model").write_bytes(data)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    size, end = pieces.get_piece_size(), pieces.piece_to_id("[UNUSED_TOKEN_145]")
    tokens = {end: rules("<|im_end|>"), end + 1: rules("<|im_start|>")}
    tokens |= {size + i: rules(token) for i, token in enumerate(IMAGE_TOKENS)}
    own = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    write_config(path, tokens, tokenizer_class="InternLM2Tokenizer", **own)
    return path


def write_internlm3(path: Path) -> Path:
    """Control tokens are user-defined pieces; a ``legacy`` that its class does not read."""
    path.mkdir(parents=True, exist_ok=True)
    own = ["<|im_start|>", "<|im_end|>"]
    data = sentencepiece_model(user_defined_symbols=own)
    (path / "tokenizer.model").write_bytes(data)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    size = pieces.get_piece_size()
    tokens = {pieces.piece_to_id(token): rules(token) for token in own}
    tokens |= {size + i: rules(token) for i, token in enumerate(IMAGE_TOKENS)}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    write_config(path, tokens, tokenizer_class="InternLM3Tokenizer", legacy=False, **roles)
    return path


def write_yi(path: Path) -> Path:
    """Control tokens are user-defined pieces themselves; no beginning, ``legacy``."""
    path.mkdir(parents=True, exist_ok=True)
    own = ["<|im_start|>", "<|im_end|>", "<img>", "</img>"]
    data = sentencepiece_model(
        user_defined_symbols=own,
        add_dummy_prefix=False,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
    )
    (path / "tokenizer.model").write_bytes(data)
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    rest = [token for token in IMAGE_TOKENS if token not in own]
    write_json(path / "added_tokens.json", {token: size + i for i, token in enumerate(rest)})
    roles = {"bos_token": "<|startoftext|>", "pad_token": "<unk>", "add_bos_token": False}
    write_config(path, {}, tokenizer_class="LlamaTokenizer", legacy=True, **roles)
    return path


PHI3_ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def write_phi3(path: Path) -> Path:
    """Control tokens that eat the white space after them; not ``legacy``."""
    path.mkdir(parents=True, exist_ok=True)
    data = sentencepiece_model()
    (path / "tokenizer.model").write_bytes(data)
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    tokens = {size: rules("<|endoftext|>")}
    tokens |= {size + 1 + i: rules(text, rstrip=True) for i, text in enumerate(PHI3_ROLES)}
    last = size + 1 + len(PHI3_ROLES)
    tokens |= {last + i: rules(token) for i, token in enumerate(IMAGE_TOKENS)}
    roles = {"bos_token": "<s>", "pad_token": "<|endoftext|>", "legacy": False}
    more = {"additional_special_tokens": list(IMAGE_TOKENS), "add_bos_token": True}
    write_config(path, tokens, tokenizer_class="LlamaTokenizer", **roles, **more)
    return path


def byte_level(added: Sequence[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """A trained byte-level BPE vocabulary as ``tokenizer.json``; ``parts`` replace its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    raw: dict[str, Any] = json.loads(tokenizer.to_str())
    # "!" is id 0, as in GPT-2's vocabulary.
    first = next(token for token, i in raw["model"]["vocab"].items() if i == 0)
    vocab = raw["model"]["vocab"]
    vocab[first], vocab["!"] = vocab["!"], 0
    size = len(raw["model"]["vocab"])
    listed = [{"id": size + i, **token} for i, token in enumerate(added)]
    return {**raw, "added_tokens": listed, **parts}


QWEN_ADDED = (
    *map(rules, CHATML),
    *(rules(text, special=False) for text in ("<tool_call>", "<think>", "</think>")),
    *map(rules, IMAGE_TOKENS),
)
QWEN_ROLES = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def write_qwen(path: Path, **parts: Any) -> Path:
    """``tokenizer.json`` with all that belongs to it."""
    path.mkdir(parents=True, exist_ok=True)
    raw = byte_level(QWEN_ADDED, **parts)
    write_json(path / "tokenizer.json", raw)
    tokens = {token["id"]: token for token in raw["added_tokens"]}
    plain = {i: {k: v for k, v in token.items() if k != "id"} for i, token in tokens.items()}
    write_config(path, plain, tokenizer_class="Qwen2Tokenizer", **QWEN_ROLES)
    return path


def write_qwen_in_two_files(path: Path) -> Path:
    """The same vocabulary as ``vocab.json`` and ``merges.txt``."""
    write_qwen(path)
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").unlink()
    write_json(path / "vocab.json", raw["model"]["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in raw["model"]["merges"])]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = {token["content"]: token["id"] for token in raw["added_tokens"]}
    write_json(path / "added_tokens.json", listed)
    return path


LLAMA3_ADDED = tuple(map(rules, ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS)))


def write_llama3(path: Path) -> Path:
    """A beginning by the post-processor, whole words before merges, padding is ``<|im_end|>``."""
    path.mkdir(parents=True, exist_ok=True)
    raw = byte_level(LLAMA3_ADDED, normalizer=None)
    raw["model"]["ignore_merges"] = True
    bos = {"id": "<|begin_of_text|>", "ids": [raw["added_tokens"][0]["id"]]}
    special = {"<|begin_of_text|>": {**bos, "tokens": ["<|begin_of_text|>"]}}
    one = [
        {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = {"type": "TemplateProcessing", "single": one, "special_tokens": special}
    raw["post_processor"] = {"type": "Sequence", "processors": [{**template, "pair": one}]}
    write_json(path / "tokenizer.json", raw)
    write_config(path, {}, tokenizer_class="PreTrainedTokenizerFast", pad_token="<|im_end|>")
    return path


WRITERS = {
    "internlm2": write_internlm2,
    "internlm3": write_internlm3,
    "yi": write_yi,
    "phi3": write_phi3,
    "qwen": write_qwen,
    "qwen in two files": write_qwen_in_two_files,
    "llama3": write_llama3,
}


def token_files(directory: Path, *, fast_first: bool = False) -> TokenFiles:
    """The tokenizer files of a directory."""
    files = read_token_files(
        lambda name: path if (path := directory / name).is_file() else None, fast_first=fast_first
    )
    assert files is not None, f"{directory}: no vocabulary"
    return files


def open_tokenizer(directory: Path, *, fast_first: bool = False) -> ChatTokenizer:
    """The tokenizer of a directory."""
    return load_chat_tokenizer(token_files(directory, fast_first=fast_first))
