"""How fast a compiled directory is, compared with what, and how far from what the machine can do.

settings     what is measured, and compared with what
run          from Settings to Measurements, contenders in turns; start here
timing       warm-up until steady, raw samples, intervals;  load  many callers at once
contenders   other ways to the same job: PyTorch, eager and compiled, and OpenVINO
inputs       seeded arrays and pictures
footprint    the memory of one component;  gpu_phases  where a GPU's time goes
limits       the work of a graph compared with what the machine reaches
chat         time to the first token and between tokens, of several callers
machine      where it was measured;  table  the results for people
"""
