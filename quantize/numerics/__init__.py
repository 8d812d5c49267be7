"""Numbers in few bits, in NumPy: nothing here knows a model or a graph.

formats       INT8, INT4 and FP8: what a byte means, and how a number is rounded; start here
weights       a weight as it is stored;  int4  weights in blocks of 4 bits
observers     ranges of activations;  output_error  choices compared by the error of the output
smooth        outliers moved into weights;  rotation  outliers spread by a change of basis
gptq          each weight's rounding error compensated by the next
statistics    the error of each quantized layer;  threads  pieces of work run in parallel
"""
