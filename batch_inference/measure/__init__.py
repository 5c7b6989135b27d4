"""One setting on an engine: the experiment, its replicas and worker processes, nodes, devices, and what is printed.

Imports `core` and `plan`. Only `engine` and `tokenizing` import vLLM, apart from a look at its names (`vllm_names`);
only `ray_cluster` imports Ray; pandas and plots stay outside.
"""
