"""What vLLM says about a setting: the seam between asking it (`by_vllm`) and using its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """What vLLM says about a setting; None for what it does not say. Lists have one number per prompt length."""

    version: str
    refusal: str | None = None  # why it would not run the setting on any machine
    unknown: str | None = None  # why it gives no numbers
    weights_gib: float | None = None  # of the fullest device
    kv_gib: list[float] | None = None  # on a device, for one request
    pool_gib: float | None = None  # for the KV cache, on the device with the least
    waves: list[int] | None = None  # requests that fit at once
    kv_cache_tokens: int | None = None
    longest: int | None = None  # tokens that the model takes

    @property
    def by(self) -> str:
        return f"vLLM {self.version}"

    @property
    def judges(self) -> bool:
        """Whether it is known if vLLM accepts the setting."""
        return self.refusal is not None or self.unknown is None
