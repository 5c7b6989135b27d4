"""argparse for the programs here: mistakes raise their own errors, and flags cannot be abbreviated."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from batch_inference.core.errors import CleanError
from batch_inference.core.streams import show

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class Parser(argparse.ArgumentParser):
    """Raises `error_type` for wrong flags; --help ends with exit code 1 if it cannot be shown."""

    def __init__(self, error_type: type[CleanError], *, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._error_type = error_type

    def error(self, message: str) -> NoReturn:
        raise self._error_type(message)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        if file is not None:
            super().print_help(file)
        elif code := show(self.format_help().rstrip("\n")):
            raise SystemExit(code)
