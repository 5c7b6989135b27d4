import json
import os
from dataclasses import dataclass, fields


@dataclass
class EngineArgs:
    model: str = "stub/default"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    skip_tokenizer_init: bool = False
    enable_prefix_caching: bool = True
    disable_log_stats: bool = True
    worker_extension_cls: str = ""
    enable_mfu_metrics: bool = False
    jit_monitor_verbose: bool = False
    quantization: str | None = None
    load_format: str = "auto"
    hf_token: str | None = None
    hf_overrides: dict | None = None
    model_loader_extra_config: dict | None = None
    tokenizer: str | None = None
    config_format: str = "auto"
    hf_config_path: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501
    block_size: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_expert_parallel: bool = False
    served_model_name: str | None = None

    def create_engine_config(self, usage_context, headless):
        assert headless
        return self

    @staticmethod
    def add_cli_args(parser):
        for item in fields(EngineArgs):
            kind = {int | None: int, int: int, float: float, dict | None: json.loads}.get(item.type, str)
            short = {"nnodes": ["-n"], "tensor_parallel_size": ["-tp"]}.get(item.name, [])
            parser.add_argument("--" + item.name.replace("_", "-"), *short, type=kind, default=item.default)
        for flag in os.environ.get("STUB_FLAGS", "").split():
            parser.add_argument(flag, nargs="+")
        return parser
