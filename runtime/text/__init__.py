"""Texts to token ids and back.

tokenizer       InternVL's LLaMA tokenizer; start here
chat_tokenizer  the ids of a chat's prompt
templates       how each published chat model spells a conversation
embeddings      rows of a chat model's token embedding
"""
