from types import SimpleNamespace


class ModelMetrics:
    """The parts of a model that vLLM estimates the work of; of a quantized one only the last."""

    def __init__(self, vllm_config):
        names = ("attn", "ffn", "unembed")[2 if vllm_config.model_config.quantization else 0 :]
        self.metrics = [SimpleNamespace(component_type=lambda name=name: name) for name in names]
