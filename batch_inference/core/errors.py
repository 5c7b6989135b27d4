"""What every error that a user reads has in common."""

from __future__ import annotations

from batch_inference.core.secrets import redact_text
from batch_inference.core.text import escaped


class CleanError(Exception):
    """Its message is one line without control characters or secrets, wherever it came from."""

    HAS_LINES = False  # True: its own line breaks stay

    def __init__(self, message: str) -> None:
        lines = message.split("\n") if self.HAS_LINES else [message]
        super().__init__("\n".join(map(escaped, lines)))

    def __str__(self) -> str:
        return redact_text(super().__str__())
