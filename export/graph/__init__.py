"""ONNX graphs of components, and what is done to them before anything is quantized.

trace        one graph per component, traced on the meta device; start here
repeat       a tower traced a few blocks deep, the other blocks stamped
bind         initializers pointed at where their tensors are stored
dtypes       which parameter has which type at each precision
uint8_input  normalisation inside the graph
join_pairs   linear layers that read one tensor, as one product for a builder
one_block    a block of a graph on its own
bf16_twin    a bfloat16 graph that runs where bfloat16 kernels do not exist
"""
