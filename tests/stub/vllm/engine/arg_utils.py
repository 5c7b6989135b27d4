import argparse
import json
import os
from dataclasses import dataclass, fields
from types import SimpleNamespace

LACKS = os.environ.get("STUB_LACKS", "")


class ModelConfig(SimpleNamespace):
    """STUB_MULTIMODAL: the model has images too; "internvl": and looks into the vocabulary before it says so."""

    def __init__(self, args):
        multimodal = os.environ.get("STUB_MULTIMODAL", "")
        text_alone = getattr(args, "language_model_only", None)
        super().__init__(
            dtype="torch.bfloat16",
            quantization=args.quantization,
            max_model_len=2048 if args.max_model_len == -1 else args.max_model_len,
            enforce_eager=args.enforce_eager,
            skip_tokenizer_init=args.skip_tokenizer_init,
            tokenizer=args.tokenizer or args.model,
            tokenizer_revision=None,
            is_multimodal_model=bool(multimodal),
            multimodal_config=SimpleNamespace(language_model_only=text_alone) if multimodal else None,
            looks_into_vocabulary=multimodal == "internvl",
            hf_text_config=SimpleNamespace(to_dict=lambda: TEXT_CONFIG),
            hf_config=SimpleNamespace(to_dict=lambda: {"image_token_index": 5, "text_config": TEXT_CONFIG}),
        )

    @property
    def supports_multimodal_inputs(self):
        if self.looks_into_vocabulary and self.skip_tokenizer_init:
            raise ValueError("You cannot pass text prompts when `skip_tokenizer_init=True`")
        return self.is_multimodal_model and not self.multimodal_config.language_model_only

    def get_vocab_size(self):
        return 100


TEXT_CONFIG = {"bos_token_id": 1, "eos_token_id": [2], "vocab_size": 100}


@dataclass
class _EngineArgs:
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
    scheduler_cls: str | None = None
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
    mm_device_do_normalize: bool | None = None

    @classmethod
    def from_cli_args(cls, namespace):
        return cls(**{item.name: getattr(namespace, item.name) for item in fields(cls)})

    def create_model_config(self):
        return ModelConfig(self)

    def create_engine_config(self, usage_context, headless):
        assert headless
        return self

    @staticmethod
    def add_cli_args(parser):
        for item in fields(EngineArgs):
            kind = {int | None: int, int: int, float: float, dict | None: json.loads}.get(item.type, str)
            short = {"nnodes": ["-n"], "tensor_parallel_size": ["-tp"]}.get(item.name, [])
            name = "--" + item.name.replace("_", "-")
            if item.type in (bool, bool | None):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=item.default)
            else:
                parser.add_argument(name, *short, type=kind, default=item.default)
        for flag in os.environ.get("STUB_FLAGS", "").split():
            parser.add_argument(flag, nargs="+")
        return parser


@dataclass
class _WithTextAlone(_EngineArgs):
    language_model_only: bool = False


EngineArgs = _EngineArgs if LACKS == "language_model_only" else _WithTextAlone
