"""How fast a compiled directory is, compared with what, and how far from what the machine can do.

run          one component timed, with its contenders in turns; start here
timing       warm-up until steady, raw samples, intervals;  load  many callers at once
contenders   PyTorch, OpenVINO and ONNX Runtime's own quantization
inputs       seeded arrays and pictures
footprint    the memory of one component;  gpu_phases  where a GPU's time goes
workload     operations and bytes of a graph;  peaks  what the machine reaches
roofline     the one compared with the other
machine      where it was measured;  table  the results for people
"""
