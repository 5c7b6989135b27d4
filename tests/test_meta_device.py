"""What vLLM is asked for a plan, and what is made of it: on a vLLM and a torch of a few lines. How the real one answers
is tested on it (test_plan_truth_by_vllm.py, test_real_models.py)."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from batch_inference.plan import meta_device, stand_ins
from batch_inference.plan.devices import GIB
from batch_inference.plan.meta_device import answer

MIB = 2**20
QUESTION = {
    "words": ["--model", "m", "--pipeline-parallel-size", "2"], "for_gpus": True, "share_gib": 1.0, "pool_gib": None,
    "requests": [100, 1000],
}  # fmt: skip


@dataclass
class EngineArgs:
    model: str = ""
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    load_format: str = "auto"
    block_size: int | None = None
    max_model_len: int | None = 4096
    kv_cache_memory_bytes: int | None = None
    cpu_offload_gb: float = 0
    language_model_only: bool = False

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        for name in ("model", "quantization", "load-format"):
            parser.add_argument(f"--{name}", default=getattr(EngineArgs, name.replace("-", "_")))
        for name in (
            "pipeline-parallel-size",
            "block-size",
            "max-model-len",
            "kv-cache-memory-bytes",
            "cpu-offload-gb",
        ):
            parser.add_argument(f"--{name}", type=int, default=getattr(EngineArgs, name.replace("-", "_")))
        parser.add_argument("--language-model-only", action="store_true", default=False)
        return parser

    @classmethod
    def from_cli_args(cls, arguments: Any) -> EngineArgs:
        return cls(**vars(arguments))

    def create_engine_config(self, usage_context: str | None) -> Any:
        return VLLM.config_of(self, usage_context)


class Model:
    """Of one stage: a layer of 100 MiB, one that is quantized, and the head on the last stage."""

    def __init__(self, stage: int) -> None:
        sizes = [(50 * MIB, 2), (10 * MIB, 1), *([(20 * MIB, 2)] if stage else [])]
        self._weights = [
            SimpleNamespace(numel=lambda count=count: count, element_size=lambda size=size: size)
            for count, size in sizes
        ]

    def parameters(self) -> Any:
        return iter(self._weights)

    def modules(self) -> Any:
        mla = {"num_heads": 4, "qk_nope_head_dim": 128, "v_head_dim": 64, "kv_lora_rank": 512, "kv_b_proj": None}
        return [
            SimpleNamespace(kv_b_proj=None),
            SimpleNamespace(**mla),  # what wraps the layer
            *([SimpleNamespace(**mla, get_kv_cache_spec=None)] if VLLM.has_mla else []),
        ]


class FakeVLLM:
    """What each test may change."""

    def __init__(self) -> None:
        self.is_cuda_alike = False
        self.is_hybrid = self.has_mla = False
        self.longest, self.runner = 4096, "generate"
        self.model_quantization: str | None = None
        self.hf_config: Any = SimpleNamespace()
        self.layout: Any = "absent"
        self.asked: list[Any] = []
        self.problems: list[Exception | None] = []
        # Of each layer: bytes of a token, and whose keys it uses instead.
        self.layers: dict[str, tuple[int | None, str | None]] = {
            "a": (1024, None), "shared": (512, "a"), "without": (None, None), "b": (1024, None),
        }  # fmt: skip

    def config_of(self, arguments: EngineArgs, usage_context: str | None) -> Any:
        self.asked.append(("config", usage_context, arguments.block_size, arguments.language_model_only))
        if arguments.max_model_len and arguments.max_model_len > self.longest:
            raise ValueError(f"max_model_len ({arguments.max_model_len}) is greater than the derived {self.longest}")
        cache = SimpleNamespace(block_size=arguments.block_size or 128)
        if self.layout != "absent":
            cache.kv_cache_layout = self.layout
        model = SimpleNamespace(
            is_hybrid=self.is_hybrid, dtype=SimpleNamespace(itemsize=2), hf_config=self.hf_config,
            hf_text_config=SimpleNamespace(), quantization=self.model_quantization,
            max_model_len=arguments.max_model_len or self.longest, runner_type=self.runner,
            get_and_verify_max_len=lambda asked: self.longest if asked is None else asked,
        )  # fmt: skip
        return SimpleNamespace(
            model_config=model, cache_config=cache, speculative_config=None, lora_config=None,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=1, pipeline_parallel_size=arguments.pipeline_parallel_size, data_parallel_size=1,
                rank=-1,
            ),
            compilation_config=SimpleNamespace(static_forward_context={"kept": 1}),
        )  # fmt: skip

    def initialize_model(self, config: Any) -> Model:
        problem = self.problems.pop(0) if self.problems else None
        self.asked.append(
            ("build", config.parallel_config.rank, dict(config.compilation_config.static_forward_context))
        )
        if problem:
            raise problem
        return Model(config.parallel_config.rank)

    def layers_of(self, config: Any, kind: type) -> dict[str, Any]:
        assert kind is Layer
        return {f"{config.parallel_config.rank}.{name}": Layer(*sizes) for name, sizes in self.layers.items()}


class Layer:
    def __init__(self, bytes_per_token: int | None, shares: str | None) -> None:
        self.kv_sharing_target_layer_name = shares
        self._bytes = bytes_per_token

    def get_kv_cache_spec(self, _config: Any) -> Any:
        return None if self._bytes is None else SimpleNamespace(bytes=self._bytes, num_kv_heads=2)

    def get_attn_backend(self) -> str:
        return "backend"


VLLM = FakeVLLM()


def layout_of(config: Any, specs: list[dict[str, Any]], pools: list[int]) -> list[Any]:
    assert config.model_config.max_model_len == 1  # one request of the longest kind need not fit
    block = config.cache_config.block_size
    return [
        SimpleNamespace(num_blocks=pool // (block * sum(spec.bytes for spec in stage.values())), block=block)
        for stage, pool in zip(specs, pools, strict=True)
    ]


def concurrency(config: Any, cache: Any) -> float:
    return cache.num_blocks / math.ceil(config.model_config.max_model_len / cache.block)


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    VLLM.__init__()  # type: ignore[misc]

    @contextlib.contextmanager
    def around(*_: Any) -> Iterator[None]:
        yield

    def update_block(config: Any) -> None:
        VLLM.asked.append(("block", config.parallel_config.rank))
        config.cache_config.block_size *= 2

    platform = SimpleNamespace(is_cuda_alike=lambda: VLLM.is_cuda_alike, update_block_size_for_backend=update_block)
    groups = dict.fromkeys(("_WORLD", "_TP", "_PP", "_DP", "_EP"))
    layouts = SimpleNamespace(
        get_supported_kv_cache_layouts=lambda backends: [SimpleNamespace(name=f"of {backends}")],
        get_current_attn_backends=lambda config: f"stage {config.parallel_config.rank}",
    )
    modules: dict[str, dict[str, Any]] = {
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
        "vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(LLM_CLASS="offline")},
        "vllm.platforms": {"current_platform": platform},
        "vllm.config": {"set_current_vllm_config": around, "get_layers_from_vllm_config": VLLM.layers_of},
        "vllm.distributed.parallel_state": groups,
        "vllm.model_executor.model_loader.utils": {"initialize_model": lambda config: VLLM.initialize_model(config)},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": Layer},
        "vllm.utils.torch_utils": {"set_default_torch_dtype": around},
        "vllm.v1.worker.worker_base": vars(layouts),
        "vllm.v1.worker.utils": {"customize_attention_spec": customised},
        "vllm.v1.core.kv_cache_utils": {
            "get_kv_cache_configs": layout_of, "get_max_concurrency_for_kv_cache_config": concurrency,
        },
        "vllm.v1.attention.backends.utils": {
            "resolve_kv_cache_layout": lambda config, names, specs: VLLM.asked.append(
                ("layout", config.parallel_config.rank, names, len(specs))
            ),
        },
        "torch": fake_torch(),
    }  # fmt: skip
    names = {name.rsplit(".", depth)[0] for name in modules for depth in range(name.count(".") + 1)}
    for name in sorted(names):  # parents first
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    return VLLM


def customised(backend: str, spec: Any) -> Any:
    assert backend == "backend"
    return SimpleNamespace(bytes=2 * spec.bytes)


def fake_torch() -> dict[str, Any]:
    class Module:
        def register_parameter(self, name: str, parameter: Any) -> None:
            setattr(self, name, parameter)

    class Parameter:
        __slots__ = ("__dict__", "data", "device", "requires_grad")

        def __init__(self, data: Any, requires_grad: bool = True) -> None:
            self.data, self.requires_grad, self.device = data, requires_grad, data.device

    return {
        "device": lambda name: Device(name), "nn": SimpleNamespace(Module=Module, Parameter=Parameter),
        "cpu": SimpleNamespace(), "cuda": SimpleNamespace(
            is_available=lambda: False, Stream=None, Event=None, current_device=None,
        ),
    }  # fmt: skip


class Device(str):
    def __enter__(self) -> None:
        VLLM.asked.append(("on", str(self)))

    def __exit__(self, *_: object) -> None:
        VLLM.asked.append("off")


def question(*words: str, **changes: Any) -> dict[str, Any]:
    return {**QUESTION, **changes, "words": [*QUESTION["words"], *words]}  # type: ignore[misc]


# Of each stage 110 MiB of weights, 40 MiB more on the last; of a token 4 KiB, in blocks of 16.
BLOCK_BYTES = 16 * 4096
FEWEST = (1024 - 150) * MIB // BLOCK_BYTES
ANSWER = {
    "longest": 4096,
    "weights_gib": 150 / 1024,
    "kv_gib": [7 * BLOCK_BYTES / GIB, 63 * BLOCK_BYTES / GIB],
    "pool_gib": (1024 - 150) / 1024,
    "waves": [(FEWEST - 1) // 7, (FEWEST - 1) // 63],
    "kv_cache_tokens": FEWEST * 16,
}  # fmt: skip


def test_a_plan_for_gpus_by_a_vllm_without_them(fake_vllm: FakeVLLM) -> None:
    told = answer(question())
    assert told == {**ANSWER, "kv_gib": pytest.approx(ANSWER["kv_gib"])}
    built = [("on", "meta"), ("build", 0, {"kept": 1}), "off", ("on", "meta"), ("build", 1, {"kept": 1}), "off"]
    # Blocks of a GPU, and steps of one that vLLM does not know; no part for images.
    assert fake_vllm.asked == [("config", None, 16, True), *built]


def test_a_vllm_that_groups_the_layers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.33 does, in a module of its own."""
    told, seen = answer(question()), []

    def grouped(config: Any, specs: list[dict[str, Any]], pools: list[int], groups: object) -> list[Any]:
        seen.append(groups)
        return layout_of(config, specs, pools)

    module = ModuleType("vllm.v1.core.kv_cache_planning")
    vars(module).update(
        get_kv_cache_configs=grouped, get_global_kv_cache_groups=lambda _, specs: f"{len(specs)} stages"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert answer(question()) == told
    assert set(seen) == {"2 stages"}


def test_a_plan_for_the_machine_that_makes_it(fake_vllm: FakeVLLM) -> None:
    fake_vllm.is_cuda_alike = True
    told = answer(question("--block-size", "8"))
    assert told["kv_cache_tokens"] == ANSWER["kv_cache_tokens"]
    assert fake_vllm.asked[0] == ("config", "offline", 8, True)
    assert [one for one in fake_vllm.asked if one[0] == "block"] == [("block", 0), ("block", 1)]
    fake_vllm.asked.clear()
    assert answer(question(for_gpus=False))["longest"] == 4096
    assert fake_vllm.asked[0] == ("config", "offline", None, True)


def test_the_blocks_of_a_hybrid_model_follow_from_its_layers(fake_vllm: FakeVLLM) -> None:
    fake_vllm.is_hybrid = True
    answer(question())
    assert ("block", 0) in fake_vllm.asked


def test_a_model_that_generates_no_text_is_refused(fake_vllm: FakeVLLM) -> None:
    fake_vllm.runner = "pooling"
    assert answer(question()) == {
        "longest": 4096, "refusal": "it does not generate text (vLLM's runner for it is pooling)",
    }  # fmt: skip


def test_mlas_copies_leave_less_for_the_cache(fake_vllm: FakeVLLM) -> None:
    fake_vllm.has_mla = True
    told = answer(question())
    assert told["weights_gib"] == ANSWER["weights_gib"]
    assert told["pool_gib"] == pytest.approx((1024 - 150) / 1024 - 2 * 4 * (128 + 64) * 512 / GIB)


@pytest.mark.parametrize(
    ("words", "changes", "pool_mib"),
    [(("--kv-cache-memory-bytes", str(64 * MIB)), {}, 64), ((), {"pool_gib": 0.5}, 512)],
)
def test_a_cache_of_a_size_that_is_asked_for(words: tuple[str, ...], changes: Any, pool_mib: int) -> None:
    told = answer(question(*words, **changes, share_gib=None))
    blocks = pool_mib * MIB // BLOCK_BYTES
    assert (told["pool_gib"], told["kv_cache_tokens"]) == (pool_mib / 1024, blocks * 16)
    assert told["waves"] == [(blocks - 1) // 7, (blocks - 1) // 63]


def test_without_a_share_nothing_is_said_of_what_fits(fake_vllm: FakeVLLM) -> None:
    assert set(answer(question(share_gib=None))) == {"longest", "weights_gib", "kv_gib"}
    fake_vllm.layers = {"without": (None, None)}
    assert set(answer(question())) == {"longest", "weights_gib"}


@pytest.mark.parametrize(("share_mib", "waves"), [(100, [0, 0]), (150.1, [0, 0]), (151, [2, 0])])
def test_a_share_that_weights_fill_holds_nothing(share_mib: float, waves: list[int]) -> None:
    told = answer(question(share_gib=share_mib / 1024))
    assert (told["waves"], told["kv_cache_tokens"]) == (waves, 16 * 16 if waves[0] else 0)


def test_a_length_over_the_models_own_is_refused_and_its_sizes_are_told() -> None:
    told = answer(question("--max-model-len", "5000"))
    assert told.pop("refusal") == "max_model_len (5000) is greater than the derived 4096"
    assert told == {**ANSWER, "kv_gib": pytest.approx(ANSWER["kv_gib"])}


def test_a_model_that_reads_its_tensors_is_built_again_with_its_parameters_alone_on_meta(fake_vllm: FakeVLLM) -> None:
    fake_vllm.problems = [RuntimeError("Cannot copy out of meta tensor; no data!")]
    assert answer(question())["weights_gib"] == ANSWER["weights_gib"]
    assert [one for one in fake_vllm.asked if one[0] == "build"] == [
        ("build", 0, {"kept": 1}), ("build", 0, {}), ("build", 1, {"kept": 1}),
    ]  # fmt: skip
    fake_vllm.problems = [RuntimeError("CUDA is not there")]
    assert "CUDA is not there" in answer(question())["unknown"]


def test_parameters_go_to_the_device_with_what_they_carry() -> None:
    import torch

    class Tensor:
        def __init__(self, device: str) -> None:
            self.device = device

        def to(self, device: str) -> Tensor:
            return Tensor(device)

    module: Any = torch.nn.Module()
    before: Any = torch.nn.Parameter(Tensor("cpu"), requires_grad=False)  # type: ignore[arg-type]
    before.loader = "its loader"
    there: Any = torch.nn.Parameter(Tensor("meta"))  # type: ignore[arg-type]
    register = torch.nn.Module.register_parameter
    with meta_device._parameters_on("meta"):
        module.register_parameter("moved", before)
        module.register_parameter("kept", there)
        module.register_parameter("none", None)
    assert torch.nn.Module.register_parameter is register
    assert module.moved is not before
    assert (module.moved.data.device, module.moved.loader, module.moved.requires_grad) == ("meta", "its loader", False)
    assert (module.kept is there, module.none) == (True, None)


@pytest.mark.parametrize(
    ("words", "changes", "reason"),
    [
        (("--quantization", "fp8"), {}, "weights are quantized while they load"),
        (("--cpu-offload-gb", "1"), {}, "part of the weights goes to main memory"),
        (("--load-format", "bitsandbytes"), {}, "--load-format bitsandbytes may change the weights"),
        ((), {"model_quantization": "gguf"}, "vLLM learns the sizes in a GGUF file only when it loads it"),
        (("--no-such",), {}, "unrecognized arguments: --no-such"),
    ],
)
def test_what_is_not_as_it_is_built_is_unknown(
    words: tuple[str, ...], changes: dict[str, Any], reason: str, fake_vllm: FakeVLLM
) -> None:
    vars(fake_vllm).update(changes)
    assert answer(question(*words))["unknown"] == reason


def test_a_checkpoint_that_is_quantized_may_be_called_so(fake_vllm: FakeVLLM) -> None:
    fake_vllm.hf_config = SimpleNamespace(quantization_config={"quant_method": "fp8"})
    assert "unknown" not in answer(question("--quantization", "fp8"))
    assert "unknown" not in answer(question("--load-format", "runai_streamer"))


def test_a_layout_of_the_cache_is_chosen_where_vllm_leaves_it_open(fake_vllm: FakeVLLM) -> None:
    fake_vllm.layout = "chosen"
    answer(question())
    assert not [one for one in fake_vllm.asked if one[0] == "layout"]
    fake_vllm.layout = None
    answer(question())
    assert [one for one in fake_vllm.asked if one[0] == "layout"] == [
        ("layout", 0, [["of stage 0"]], 4), ("layout", 1, [["of stage 1"]], 4),
    ]  # fmt: skip


# --- what stands in the place of a worker's surroundings --------------------------------------------------------------


def test_the_process_that_plans_is_no_rank_sees_no_device_and_keeps_what_it_finds_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {**dict.fromkeys(ranks, "1"), "CUDA_VISIBLE_DEVICES": "0", "HOME": "/h", "VLLM_CACHE_ROOT": "/theirs"}
    monkeypatch.setattr(stand_ins.os, "environ", environment)
    monkeypatch.setattr(stand_ins.importlib.util, "find_spec", {"torchvision": "there"}.get)
    finders = list(sys.meta_path)
    stand_ins.prepare("/own")
    assert environment == {
        "CUDA_VISIBLE_DEVICES": "", "HOME": "/h", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": "/own", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    assert sys.meta_path == finders
    environment["VLLM_CPU_KVCACHE_SPACE"] = "40"
    stand_ins.prepare("/own")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "40"


def test_without_torchvision_whatever_is_looked_for_in_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins.os, "environ", {})
    monkeypatch.setattr(stand_ins.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "meta_path", [])
    stand_ins.prepare("/own")
    (finder,) = sys.meta_path
    assert finder.find_spec("torchvisionary", None) is None
    for name in ("torchvision", "torchvision.transforms.v2"):
        spec = finder.find_spec(name, None)
        assert spec is not None
        module: Any = finder.create_module(spec)  # type: ignore[attr-defined]
        assert (module.__name__, module.__path__, module.__version__) == (name, [], "0.0.0")
        assert module.functional.pil_to_tensor


def test_streams_and_a_quick_cpu_are_there_for_a_while() -> None:
    import torch

    cuda: Any = torch.cuda
    with stand_ins.no_streams(), stand_ins.quickest_cpu():
        assert cuda.Stream(1, priority=2)
        assert cuda.Event(enable_timing=True)
        assert cuda.current_device() == "meta"
        assert torch.cpu._is_amx_tile_supported() is True
    assert (cuda.Stream, cuda.Event, cuda.current_device) == (None, None, None)
    assert not hasattr(torch.cpu, "_is_amx_tile_supported")
    cuda.is_available = lambda: True
    with stand_ins.no_streams():
        assert cuda.Stream is None
