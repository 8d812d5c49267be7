"""What a graph asks for, what the machine reaches, and the one compared with the other.

workload     operations and bytes of a graph;  peaks  what the machine reaches
roofline     the work compared with the peaks;  forecast  a GPU that is not there
"""
