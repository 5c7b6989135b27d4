from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

from batch_inference.core.config import ConfigError


@dataclass
class Lengths:
    prompt_tokens: array
    output_tokens: array
    content_hash: str


def lengths_of(workload, config, say):
    p, o = array("I"), array("I")
    for e in workload.entries():
        if e.prompt_tokens is None and e.prompt_token_ids is None:
            raise ConfigError("texts later")
        p.append(e.prompt_tokens or len(e.prompt_token_ids))
        o.append(e.output_tokens or 0)
    return Lengths(p, o, hashlib.sha256(workload.path.read_bytes()).hexdigest()[:16])


def ids_of(workload, config, indices):
    return [None] * len(indices)
