"""Numbers in few bits, in NumPy: nothing here knows a model or a graph.

formats       INT8, INT4 and FP8: what a byte means, and how a number is rounded; start here
weights       a weight as it is stored;  int4  weights in blocks of 4 bits
observers     ranges of activations;  output_error  choices by the error of the output
smooth        outliers moved into weights;  rotation  outliers spread by a change of basis
gptq          each weight's rounding error made good by the next
statistics    what quantization did to each layer;  threads  pieces of work at once
"""
