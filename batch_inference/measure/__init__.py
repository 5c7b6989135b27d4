"""One setting on an engine: the experiment, its replicas and their worker processes, nodes, devices, what is printed.

Imports `core` and `plan`. `engine` and `tokenizing` alone import vLLM, but for a look at its names (`vllm_names`);
`ray_cluster` alone Ray; pandas and plots stay outside.
"""
