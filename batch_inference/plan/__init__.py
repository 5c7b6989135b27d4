"""What can be known before an engine loads: this machine's devices, the model's sizes, memory, obstacles, the plan.

Imports `core`. Python's own library is enough for all of it but `meta_device`, the process in which vLLM is asked.
"""
