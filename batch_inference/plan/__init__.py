"""What is known before an engine loads: this machine's devices, the model's sizes, memory, obstacles, the plan.

Imports `core`. Needs only Python's own library, except for `meta_device`, the process in which vLLM is asked.
"""
