"""A result file that grows point by point, at the same cost for each point.

New points go to a journal beside the file and are folded in once it holds as many as the file, so each point is
written about three times in all, however many there are. Folding only copies lines, so the raw runs of a point need
not stay in memory once it is saved. Both files stay open, so their content can be shown even if the folder is gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from batch_inference.core.files import open_regular
from batch_inference.core.result_file import (
    FIRST_POINT,
    POINTS_END,
    JournalHead,
    cannot_be_written,
    head_of,
    journal_of,
    point_line,
    write_document,
)  # fmt: skip
from batch_inference.core.results import Point, PointKey, Result
from batch_inference.core.signals import held_back


class GrowingFile:
    """The file of `result`: the head comes from `result`, and points are only added."""

    def __init__(self, path: Path, result: Result) -> None:
        self.path = path
        self._result = result
        self._file: IO[bytes] | None = None
        self._journal: IO[bytes] | None = None
        self._in_file: set[PointKey] = set()
        self._in_journal: set[PointKey] = set()
        self._unsaved: list[str] = []  # lines of points that could not be written

    @property
    def has_begun(self) -> bool:
        return self._file is not None

    @held_back()
    def begin(self) -> None:
        """Replace what is there with the result and all its points. Raises ResultFileError."""
        self._write(map(point_line, self._result.points), {point.key for point in self._result.points})

    @held_back()
    def add(self, point: Point) -> None:
        """Add a point, or one that was measured again. On ResultFileError the point is kept in memory."""
        line = point_line(point)
        self._unsaved.append(line)
        self._append(line)
        self._unsaved.clear()
        self._in_journal.add(point.key)
        if len(self._in_journal) >= len(self._in_file):
            self.fold()

    @held_back()
    def fold(self) -> None:
        """Write the head again, with all points after it. Raises ResultFileError."""
        self._write(self._lines(), self._in_file | self._in_journal)

    def close(self) -> None:
        for file in (self._file, self._journal):
            if file is not None:
                file.close()

    def told(self) -> str | None:
        """The whole document, including what could not be saved; None if there is no point."""
        if not (self._in_file or self._in_journal or self._unsaved):
            return None
        return "".join(self._document([*self._lines(), *self._unsaved]))

    def _write(self, lines: Iterable[str], keys: set[PointKey]) -> None:
        write_document(self.path, self._document(lines))
        self.close()
        self._file, self._journal = self.path.open("rb"), None
        self._in_file, self._in_journal = keys, set()
        # A reader that comes before this still sees that the journal was folded in.
        with contextlib.suppress(OSError):
            journal_of(self.path).unlink(missing_ok=True)

    def _document(self, lines: Iterable[str]) -> Iterator[str]:
        yield head_of(self._result)
        end = ""
        for line in lines:
            yield f"{end}{line}"
            end = ",\n"
        yield ("\n" if end else "") + POINTS_END

    def _append(self, line: str) -> None:
        try:
            if self._journal is None:
                # Unbuffered: otherwise data that a full disk refused would be written again at every read or close.
                self._journal = open_regular(journal_of(self.path), "w+b", buffering=0)
            head = b""
            if self._journal.seek(0, os.SEEK_END) == 0:
                began = JournalHead(self._result.environment.started_at, len(self._in_file))
                head = msgspec.json.encode(began) + b"\n"
            _write_or_undo(self._journal, head + line.encode() + b"\n")
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def _lines(self) -> Iterator[str]:
        """The line of every point, as it was last measured. What the journal has is read from it: after an interruption
        it may have more than was counted."""
        last = {_key_of(line): number for number, line in enumerate(self._lines_of_journal())}
        again = self._in_file & last.keys()
        for line in self._lines_of_file():
            if not again or _key_of(line) not in again:
                yield line
        newest = set(last.values())
        yield from (line for number, line in enumerate(self._lines_of_journal()) if number in newest)

    def _lines_of_journal(self) -> Iterator[str]:
        if self._journal is None:
            return
        with os.fdopen(self._journal.fileno(), "rb", closefd=False) as journal:
            journal.seek(0)
            next(journal, None)
            for line in journal:
                yield line.decode().rstrip("\n")

    def _lines_of_file(self) -> Iterator[str]:
        if self._file is None:
            return
        self._file.seek(0)
        for line in self._file:
            if line == FIRST_POINT:
                break
        for line in self._file:
            if line == POINTS_END.encode().splitlines(keepends=True)[0]:
                return
            yield line.decode().rstrip(",\n")


def _key_of(line: str) -> PointKey:
    return msgspec.json.decode(line, type=PointKey)


def _write_or_undo(file: IO[bytes], line: bytes) -> None:
    """Append to the file and sync it to disk. On OSError no part of the line is left."""
    end = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise
