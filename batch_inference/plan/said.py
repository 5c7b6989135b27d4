"""What vLLM says of a setting: the seam between asking it (`by_vllm`) and what is made of its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """What vLLM says of a setting; None for what it does not say. Lists have a number for each prompt length."""

    version: str
    refusal: str | None = None  # why it does not run the setting anywhere
    unknown: str | None = None  # why it gives no numbers
    weights_gib: float | None = None  # of the fullest device
    kv_gib: list[float] | None = None  # on a device, of one request
    pool_gib: float | None = None  # for the KV cache, of the device with the least
    waves: list[int] | None = None  # requests that fit at once
    kv_cache_tokens: int | None = None
    longest: int | None = None  # tokens that the model takes

    @property
    def by(self) -> str:
        return f"vLLM {self.version}"

    @property
    def judges(self) -> bool:
        """Whether it is known if vLLM takes the setting."""
        return self.refusal is not None or self.unknown is None
