"""The tokenizer of a checkpoint: which of its files are passed on, and that they are the model's.

A directory may have a vocabulary in several forms; the one that the runtime reads is passed on
(``runtime.text.token_files``). A tokenizer of another model gives ids that mean something else, and
no error; so it is refused before any work where it can be told.
"""

from __future__ import annotations

import logging
from pathlib import Path

from internvl_edge.errors import ArtifactError, CheckpointError, MissingDependency
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.files.content import content_of
from internvl_edge.files.reading import is_there
from internvl_edge.runtime.text.chat_tokenizer import (
    IMAGE_TOKEN,
    ChatTokenizer,
    load_chat_tokenizer,
)
from internvl_edge.runtime.text.templates import TEMPLATES
from internvl_edge.runtime.text.token_files import (
    FAST,
    MERGES,
    SENTENCEPIECE,
    VOCAB,
    TokenFiles,
    read_token_files,
)
from internvl_edge.runtime.text.tokenizer import Tokenizer

__all__ = ["check_tokenizer", "has_vocabulary", "token_files", "unread_vocabularies"]

logger = logging.getLogger(__name__)

VOCABULARIES = (SENTENCEPIECE, FAST, VOCAB, MERGES)
FEW = 0.5  # of a table's rows: with fewer pieces, most of it is never read
NATIVE_LAYOUT = "internvl_hf"  # whose ids the fast tokenizer made
VIDEO = "<video>"  # its id may be beyond the embedding's rows: it is a place, and never read


def token_files(folder: Path, config: CheckpointConfig) -> TokenFiles | None:
    """Read the tokenizer files of a chat checkpoint; None where it has no vocabulary.

    Raises:
        CheckpointError: a file that is not what its name says, or of another model than the next.
    """
    assert config.chat is not None
    try:
        return read_token_files(
            lambda name: folder / name if is_there(folder / name) else None,
            fast_first=config.chat.layout == NATIVE_LAYOUT,
        )
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error


def unread_vocabularies(folder: Path, config: CheckpointConfig) -> frozenset[str]:
    """Name the vocabularies that no runtime of this model reads."""
    read = {SENTENCEPIECE}
    if config.chat is not None and (files := token_files(folder, config)) is not None:
        read = {files.kind} | ({MERGES} if files.merges is not None else set())
    return frozenset(VOCABULARIES) - read


def has_vocabulary(folder: Path, config: CheckpointConfig) -> bool:
    """Tell whether a checkpoint has what strings become ids with."""
    if config.chat is None:
        return is_there(folder / SENTENCEPIECE)
    return token_files(folder, config) is not None


def check_tokenizer(folder: Path, config: CheckpointConfig) -> None:
    """Refuse the tokenizer of another model.

    Raises:
        CheckpointError: an id that the model has no row for, a token of its prompts that is missing
            or has another id than the config says, or a file that is no vocabulary.
    """
    chat = config.chat
    if chat is None:
        _check_pieces(folder, config)
        return
    if chat.llama is None or (files := token_files(folder, config)) is None:
        return
    rows = chat.llama.vocab_size
    for token in files.added:
        if token.id >= rows and token.text != VIDEO:
            raise _of_another(files, f"ids below {rows}, the rows of the embedding", token.id)
    try:
        tokenizer = load_chat_tokenizer(files)
    except MissingDependency as error:
        logger.warning("%s: the tokenizer is passed on unchecked: %s", files.vocabulary, error)
        return
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer.largest_id >= rows:
        what = f"ids below {rows}, the rows of the embedding"
        if files.kind != SENTENCEPIECE or not files.added:
            raise _of_another(files, what, tokenizer.largest_id)
        # its own tokens have rows: shrunk models keep the vocabulary, and ids are looked up checked
        logger.warning(
            "%s: expected %s, found %d; texts with such ids are refused when they are asked",
            files.vocabulary,
            what,
            tokenizer.largest_id,
        )
    _check_tokens(tokenizer, chat, files)


def _check_pieces(folder: Path, config: CheckpointConfig) -> None:
    """Open an InternVL-C's or -G's SentencePiece model, and hold it against the embedding."""
    path = folder / SENTENCEPIECE
    if config.internvl is None or not is_there(path):
        return
    content = content_of(path)
    if content is not None:
        raise CheckpointError(
            f"{path}: expected a SentencePiece model, found {content.what}; {content.remedy}"
        )
    try:
        pieces = Tokenizer(path).vocab_size
    except ArtifactError as error:
        raise CheckpointError(
            f"{error}; download it again, or move it away to compile for token ids alone"
        ) from error
    rows = config.internvl.qllama.vocab_size
    told = f"{path}: {pieces} pieces, {rows} rows of token embeddings"
    if pieces > rows:
        raise CheckpointError(
            f"{told}: expected no more pieces than rows; it is another model's tokenizer, take "
            "the one that was published with these weights"
        )
    if pieces < FEW * rows:
        logger.warning("%s: most rows are never read; is it this model's?", told)


def _check_tokens(tokenizer: ChatTokenizer, chat: ChatConfig, files: TokenFiles) -> None:
    """Require the tokens that the model's prompts are made of."""
    if chat.layout != "llava":
        own = tokenizer.ids.get(IMAGE_TOKEN)
        if own is None:
            raise _of_another(files, f"{IMAGE_TOKEN} among its tokens", "none")
        if chat.image_token_id not in (None, own):
            raise _of_another(files, f"{IMAGE_TOKEN} as id {chat.image_token_id}", own)
    template = TEMPLATES.get(chat.template)
    if template is not None and template.stop not in tokenizer.ids:
        if files.kind != SENTENCEPIECE:
            what = f"{template.stop} among its tokens, which ends an answer in {template.name}"
            raise _of_another(files, what, "none")
        # the ends that the configuration names, and </s>, end an answer all the same
        logger.warning(
            "%s: expected %s among its tokens, which ends an answer in %s, found none; is it this "
            "model's?",
            files.vocabulary,
            template.stop,
            template.name,
        )


def _of_another(files: TokenFiles, expected: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{files.vocabulary}: expected {expected}, found {found}; the tokenizer files are of "
        "another model than config.json"
    )
