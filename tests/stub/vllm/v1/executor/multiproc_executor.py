import os
import time


class MultiprocExecutor:
    """The workers of a node other than 0: vLLM's end when the engine on node 0 shuts down, these never."""

    def __init__(self, vllm_config, monitor_workers):
        assert monitor_workers is False
        print("stub vLLM serves node 0 as node", vllm_config.node_rank, "of", vllm_config.nnodes, flush=True)

    def start_worker_monitor(self, inline):
        assert inline
        if os.environ.get("STUB_FAIL") == "serve":
            raise RuntimeError("no workers on this node")
        time.sleep(3600)
