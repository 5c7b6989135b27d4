"""A result file that grows point by point, at a cost that stays the same for each.

New points go to a journal beside the file, and are folded in when it holds as many as the file: each point is written
about three times in all, however many there are. Only lines are copied then, so that the raw runs of a point need not
stay in memory once it is saved. Both files stay open: what they hold can be told even where their folder is gone.
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


class GrowingFile:
    """The file of `result`: its head is taken from there, its points are only added."""

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

    def begin(self) -> None:
        """Replace what is there by the result with all its points. Raises ResultFileError."""
        self._write(map(point_line, self._result.points), {point.key for point in self._result.points})

    def add(self, point: Point) -> None:
        """One more, or the same measured again. Raises ResultFileError, and keeps it in mind then."""
        line = point_line(point)
        self._unsaved.append(line)
        self._append(line)
        self._unsaved.clear()
        self._in_journal.add(point.key)
        if len(self._in_journal) >= len(self._in_file):
            self.fold()

    def fold(self) -> None:
        """Write the head anew, and all points behind it. Raises ResultFileError."""
        self._write(self._lines(), self._in_file | self._in_journal)

    def close(self) -> None:
        for file in (self._file, self._journal):
            if file is not None:
                file.close()

    def told(self) -> str | None:
        """The whole document, with what could not be saved; None without any point."""
        if not (self._in_file or self._in_journal or self._unsaved):
            return None
        return "".join(self._document([*self._lines(), *self._unsaved]))

    def _write(self, lines: Iterable[str], keys: set[PointKey]) -> None:
        write_document(self.path, self._document(lines))
        self.close()
        self._file, self._journal = self.path.open("rb"), None
        self._in_file, self._in_journal = keys, set()
        # A reader that comes before this sees that it has been folded in.
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
                # Without a buffer: what a full disk does not take would be tried again wherever it is read or closed.
                self._journal = open_regular(journal_of(self.path), "w+b", buffering=0)
            head = b""
            if self._journal.seek(0, os.SEEK_END) == 0:
                began = JournalHead(self._result.environment.started_at, len(self._in_file))
                head = msgspec.json.encode(began) + b"\n"
            _write_or_undo(self._journal, head + line.encode() + b"\n")
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def _lines(self) -> Iterator[str]:
        """Of every point, as it was measured last."""
        again = self._in_file & self._in_journal
        for line in self._lines_of_file():
            if not again or msgspec.json.decode(line, type=PointKey) not in again:
                yield line
        if self._journal is not None:
            with os.fdopen(self._journal.fileno(), "rb", closefd=False) as journal:
                journal.seek(0)
                next(journal, None)
                yield from (line.decode().rstrip("\n") for line in journal)

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


def _write_or_undo(file: IO[bytes], line: bytes) -> None:
    """At the end of the file, and on the disk. Raises OSError, and leaves no part of it there then."""
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
