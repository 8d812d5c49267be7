"""Tokens, one after the other, on a decoder with a key/value cache.

loop         greedy, sampled or by beams; start here
batch        the prompts and their rows under way
beams        beam search;  largest  the few most likely of all tokens
limits       requests that an engine takes;  text  ids as text, piece by piece
cache        a cache that grows;  fixed_cache  one of fixed capacity, written in place
answers      one prompt each, as tasks ask for it;  prefixes  caches of recent prompts
slots        many answers in one decoder;  drafts  tokens proposed before they are computed
"""
