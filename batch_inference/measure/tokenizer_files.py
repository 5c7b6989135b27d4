"""The ids that a tokenizer's files add to its vocabulary: markers of images, of roles, of tools.

No tokenizer is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_inference.core.files import read_regular

# Newer models have them all in the first file, older ones in the second.
_FILES = ("tokenizer.json", "tokenizer_config.json")


def added_ids(tokenizer: str, revision: str | None) -> set[int]:
    """`tokenizer`: a folder, or a hub name whose files are on this machine; for others none are known."""
    return {number for name in _FILES for number in _added_in(_content(tokenizer, name, revision))}


def _added_in(content: Any) -> Iterator[int]:
    if not isinstance(content, dict):
        return
    listed, by_id = content.get("added_tokens"), content.get("added_tokens_decoder")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"]
    yield from (int(number) for number in (by_id if isinstance(by_id, dict) else ()) if number.isdecimal())


def _content(tokenizer: str, name: str, revision: str | None) -> Any:
    """None if there is no such file, or it cannot be read: vLLM may do without."""
    path = Path(tokenizer) / name if Path(tokenizer).is_dir() else _in_cache(tokenizer, name, revision)
    try:
        return json.loads(read_regular(path)) if path else None
    except (OSError, ValueError, RecursionError):
        return None


def _in_cache(repository: str, name: str, revision: str | None) -> Path | None:
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
    except ValueError:  # it is not a hub name
        return None
    return Path(found) if isinstance(found, str) else None
