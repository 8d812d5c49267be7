"""Texts to token ids and back.

requests         what callers hand over, as lists and arrays
tokenizer        InternVL's LLaMA tokenizer; start here
chat_tokenizer   the ids of a chat's prompt
sentence_pieces  a chat model's vocabulary in SentencePiece
bpe_pieces       the same in byte-level BPE, by Hugging Face's tokenizers
token_files      which files of a checkpoint say what about its tokens
templates        how each published chat model spells a conversation
padding          rows of ids as long as the longest
embeddings       rows of a chat model's token embedding
"""
