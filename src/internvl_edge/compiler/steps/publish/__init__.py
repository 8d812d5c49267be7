"""What a directory has besides the components' graphs and their weights.

files           what is copied, the list of all files, the report, the manifest; start here
clip            what transformers' and optimum's classes for CLIP open, with ``--layout optimum``:
joined_graph        ``model.onnx``: both towers' graphs as one, on the same weights
fast_tokenizer      ``tokenizer.json``: the SentencePiece model, and what goes around a text
clip_settings       ``config.json`` and the other settings, from those of the checkpoint
"""

from internvl_edge.compiler.steps.publish.clip import WriteClip
from internvl_edge.compiler.steps.publish.files import CopyFiles, ListFiles, Publish

__all__ = ["CopyFiles", "ListFiles", "Publish", "WriteClip"]
