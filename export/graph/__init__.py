"""ONNX graphs of components, and the rewrites of them that do not quantize.

trace        traces one graph per component on the meta device; start here
lower        exchanges operators without an ONNX form, in place of PyTorch's exporter
repeat       copies blocks, so that a tower is traced only a few blocks deep
bind         points initializers at their stored tensors
dtypes       decides the type of each parameter at each precision
signature    what a graph takes and gives
last_logits  lets a call choose of which positions it wants logits
uint8_input  moves normalisation into the graph
join_pairs   joins pairs of linear layers that read one tensor, to save a builder's memory
one_block    cuts one block out of a graph
providers    rewrites towers and decoders for one of ONNX Runtime's providers
bf16_twin    rewrites a bfloat16 graph for machines without bfloat16 kernels
"""
