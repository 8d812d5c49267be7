"""The PyTorch reference of every model that internvl-edge compiles.

internvl   InternVL-C and -G;  chat  InternVL-Chat; start at either
vit        the vision tower;  qllama, llama  the language models;  heads  the attention pool
attention  attention and rotary positions, for PyTorch and for the exporter
"""

from internvl_edge.export.models.chat import Chat
from internvl_edge.export.models.heads import AttentionPool
from internvl_edge.export.models.internvl import InternVL
from internvl_edge.export.models.qllama import QLlama
from internvl_edge.export.models.vit import InternViT

__all__ = ["AttentionPool", "Chat", "InternVL", "InternViT", "QLlama"]
