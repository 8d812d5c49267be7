"""How the demo model was trained; not part of the wheel.

train          ``python -m internvl_edge.demo.training.train OUT``; start here
batches        scenes and texts as batches;  tokenizer  the demo's vocabulary
reference      the quality of the trained model in PyTorch
talk           a chat model of InternVL3's structure on the same scenes, bundled as demo-chat
conversations  dialogues as batches;  vocabulary  its byte-level pieces
"""
