"""The requests of a job, read one by one from a file in any of the usual formats, however many there are.

The format follows from the content: a JSON array or JSON lines (OpenAI batch lines, vLLM's custom data set, ShareGPT,
token ids, only lengths), or a CSV of lengths. Needs only Python's own library, because plans use it too.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO, cast

from batch_inference.core.config import ConfigError
from batch_inference.core.files import open_regular
from batch_inference.core.text import counted, listed, quoted
from batch_inference.core.values import MOST_TOKENS

_LENGTHS = ("prompt_tokens", "output_tokens")
# The limit of a request's output: OpenAI's names, the newer one first, and that of vLLM's own data set.
_LIMITS = ("max_completion_tokens", "max_tokens", "output_tokens")
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# How much of a JSON array is read at a time.
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_LONGEST_ENTRY = 1 << 26  # characters: far more than any model takes
_IDS = range(1 << 31)  # token ids: far more than any vocabulary has
_NO_JSON = "it is not JSON"
# Fields of an OpenAI body that change the tokens of a prompt.
_CHAT_OPTIONS = (
    "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template_kwargs", "documents",
    "reasoning_effort",
)  # fmt: skip
_COMPLETION_OPTIONS = ("add_special_tokens",)
# vLLM's own names for structured output.
_STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "tools")
_HUMANS, _MODELS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bard", "bing")


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. Its prompt is a length, ids, a text, or messages for a chat template."""

    prompt_tokens: int | None = None
    prompt_token_ids: Sequence[int] | None = None
    prompt: str | None = None
    messages: Sequence[dict[str, Any]] | None = None
    output_tokens: int | None = None  # None if the file does not say it
    output: str | None = None  # an answer of that length
    is_question: bool = False  # the prompt goes into the chat template as a user's message
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of an OpenAI body that change the tokens


class _BadLineError(Exception):
    """A line that is not a request; the message says why."""


class _RefusedError(Exception):
    """A request of a kind that is not measured; the message names it in words that follow a number."""


@dataclass
class Workload:
    """The file at `path`, which can be read many times. Each reading counts again what is left out."""

    path: Path
    skip_bad_lines: bool = False
    left_out: set[int] = field(default_factory=set)  # numbers of entries, from 0, that vLLM refuses
    bad_lines: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # kind -> requests
    stamp: tuple[int, int] | None = None  # of the file when the lengths were read
    notes: list[str] = field(default_factory=list)  # on how vLLM read its texts
    # Token ids of entries that were asked for, by their place among all entries returned.
    ids: dict[int, Sequence[int] | None] = field(default_factory=dict, repr=False)
    number: int = -1  # of the last entry read
    place: str = ""  # likewise
    flag: str = "--prompts-file"  # the flag that named the file
    _file: TextIO | None = field(default=None, repr=False, compare=False)
    _bytes: int = 0  # at the end of the last reading

    @property
    def bytes_read(self) -> int:
        """Approximately, in the current reading."""
        return self._file.buffer.tell() if self._file and not self._file.closed else self._bytes

    @property
    def _by_flag(self) -> str:
        """How to leave out a line, if there is a flag for it."""
        return " with --skip-bad-lines" if self.flag == "--prompts-file" else ""

    def entries(self) -> Iterator[Entry]:
        """Raises ConfigError if the file cannot be read or has no request, at its first bad line, and at its end
        for requests of a kind that is not measured. With `skip_bad_lines` both are left out instead."""
        self.bad_lines, self.refused, self.number = 0, Counter(), -1
        first: dict[str, str] = {}  # kind -> where
        usable = 0
        for where, document in self._documents():
            try:
                entry = entry_of(document)
            except _BadLineError as error:
                self._bad(where, str(error))
            except _RefusedError as error:
                self.refused[str(error)] += 1
                first.setdefault(str(error), where)
            else:
                self.number += 1
                self.place = where
                if self.number in self.left_out:
                    self.bad_lines += 1
                else:
                    usable += 1
                    yield entry
        if self.refused and not self.skip_bad_lines:
            kinds = listed(f"{count} {kind} (first: {first[kind]})" for kind, count in self.refused.items())
            raise ConfigError(f"{self.flag} {self.path}: not measured: {kinds}; leave them out{self._by_flag}")
        if not usable:
            raise ConfigError(f"{self.flag} {self.path}: it has no usable request; write one on each line")

    def told(self) -> str | None:
        """What the last reading left out; None if nothing."""
        parts = [f"{count} {kind}" for kind, count in self.refused.items()]
        parts += [counted(self.bad_lines, "bad line")] if self.bad_lines else []
        return f"{self.flag} {self.path}: left out: {listed(parts)}" if parts else None

    def leave_out(self, number: int, place: str, why: str) -> None:
        """Leave out an entry that vLLM refuses; raises ConfigError unless bad lines are skipped."""
        self._bad(place, why)
        self.left_out.add(number)

    def _bad(self, where: str, why: str) -> None:
        if not self.skip_bad_lines:
            raise ConfigError(f"{self.flag} {self.path}, {where}: {why}; fix it, or leave it out{self._by_flag}")
        self.bad_lines += 1

    def _documents(self) -> Iterator[tuple[str, Any]]:
        """(place, content) of each request."""
        try:
            with open_regular(self.path, "r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                self._file = cast(TextIO, file)
                start = _first_character(file)
                if start == "[":
                    yield from self._of_array(file)
                elif start == "{":
                    yield from self._of_lines(file)
                elif start:
                    yield from self._of_table(file)
                self._bytes = self.bytes_read
        except OSError as error:
            raise ConfigError(f"{self.flag} {self.path}: it cannot be read ({error.strerror}); give a file") from error

    def _of_lines(self, file: IO[str]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(self._lines(file), 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                self._bad(f"line {number}", _NO_JSON)

    def _of_array(self, file: IO[str]) -> Iterator[tuple[str, Any]]:
        decode, text, at, number = json.JSONDecoder().raw_decode, file.read(_CHUNK).lstrip(), 1, 0
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if len(text) - at < _CHUNK and (chunk := file.read(_CHUNK)):
                text, at = text[at:] + chunk, 0
                continue
            if text.startswith("]", at):
                self._check_end(text[at + 1 :], file, number)
                return
            try:
                document, at = decode(text, at)
            except (ValueError, RecursionError):
                if len(text) - at > _LONGEST_ENTRY or not (chunk := file.read(_CHUNK)):
                    raise self._broken_list(number, text[at:]) from None
                text, at = text[at:] + chunk, 0
                continue
            number += 1
            yield f"entry {number}", document

    def _broken_list(self, number: int, rest: str) -> ConfigError:
        """Not just a bad line: it is unknown where the next entry begins."""
        why = f"{_NO_JSON}, and nothing after it can be read" if rest else "the list has no closing ]"
        return ConfigError(f"{self.flag} {self.path}, entry {number + 1}: {why}; fix it, or write lines of JSON")

    def _check_end(self, text: str, file: IO[str], number: int) -> None:
        """Check that nothing follows the list."""
        while not text.strip() and (text := file.read(_CHUNK)):
            pass
        if text.strip():
            raise ConfigError(
                f"{self.flag} {self.path}: something follows its list of {counted(number, 'request')}; give "
                "one list, or lines of JSON"
            )

    def _of_table(self, file: IO[str]) -> Iterator[tuple[str, Any]]:
        rows = self._rows(file)
        where, cells = next(rows, ("line 1", []))
        names = [cell.strip() for cell in cells]
        if _LENGTHS[0] not in names:
            begin = f"{self.flag} {self.path}, {where}: {_shown(','.join(cells))}"
            raise ConfigError(f"{begin} begins like neither JSON nor a CSV with the columns {listed(_LENGTHS)}")
        for where, cells in rows:
            if len(cells) > len(names):
                self._bad(where, f"it has {len(cells)} cells for {counted(len(names), 'column')}")
            else:
                given = dict(zip(names, cells, strict=False))
                yield where, {name: given[name] for name in _LENGTHS if given.get(name, "").strip()}

    def _lines(self, file: IO[str]) -> Iterator[str]:
        """Yields an empty line in place of one longer than any request: a file may be a single line."""
        number = 0
        while line := file.readline(_LONGEST_ENTRY):
            number += 1
            if len(line) == _LONGEST_ENTRY and line[-1] not in "\r\n":
                self._bad(f"line {number}", f"it is longer than {_LONGEST_ENTRY} characters")
                while line and line[-1] not in "\r\n":
                    line = file.readline(_LONGEST_ENTRY)
                line = "\n"
            yield line

    def _rows(self, file: IO[str]) -> Iterator[tuple[str, list[str]]]:
        """(place, cells) of each row that is not empty."""
        csv.field_size_limit(_LONGEST_ENTRY)
        rows = csv.reader(self._lines(file), skipinitialspace=True)
        while True:
            where = f"line {rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                self._bad(where, f"it is not CSV ({error})")
                continue
            if any(cell.strip() for cell in cells):
                yield where, cells


def _shown(value: Any) -> str:
    """Works for a file that is not text, too."""
    return quoted(str(value).encode("utf-8", "backslashreplace").decode())


def _first_character(file: IO[str]) -> str:
    """The first that is not white space; the file is then rewound."""
    while (character := file.read(1)) and character.isspace():
        pass
    file.seek(0)
    return character


# --- one request ------------------------------------------------------------------------------------------------------


def entry_of(document: Any) -> Entry:
    """Raises _BadLineError and _RefusedError."""
    if not isinstance(document, dict):
        raise _BadLineError("it is not a JSON object")
    if "body" in document or "url" in document:
        return _of_openai(document)
    if "conversations" in document:
        return _of_sharegpt(document["conversations"])
    if "messages" in document:  # the body of an OpenAI batch line, on its own
        return _of_chat(document)
    output_tokens = _longest(document)
    if "prompt_token_ids" in document:
        return Entry(prompt_token_ids=_ids(document["prompt_token_ids"]), output_tokens=output_tokens)
    if "prompt" in document:
        prompt = _text(document["prompt"], "prompt")
        return Entry(prompt=prompt, output_tokens=output_tokens, is_question=True)
    prompt_tokens = _length(document, "prompt_tokens")
    if prompt_tokens is None:
        raise _BadLineError("it has none of body, conversations, messages, prompt, prompt_token_ids and prompt_tokens")
    return Entry(prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _of_openai(document: dict[str, Any]) -> Entry:
    """As `vllm run-batch` reads it."""
    url, body = document.get("url"), document.get("body")
    if not isinstance(body, dict):
        raise _BadLineError("its body is not an object")
    if url == "/v1/embeddings":
        raise _RefusedError("for embeddings")
    if url not in (_CHAT, _COMPLETIONS):
        raise _BadLineError(f"its url {_shown(url)} is neither {_CHAT} nor {_COMPLETIONS}")
    if url == _CHAT:
        return _of_chat(body)
    _refuse_several_and_structured(body)
    longest = _longest(body)
    prompt = _only(body.get("prompt"))
    if isinstance(prompt, list):
        return Entry(prompt_token_ids=_ids(prompt), output_tokens=longest)
    options = _options(body, _COMPLETION_OPTIONS)
    return Entry(prompt=_text(prompt, "prompt"), output_tokens=longest, options=options)


def _of_chat(body: dict[str, Any]) -> Entry:
    _refuse_several_and_structured(body)
    options = _options(body, _CHAT_OPTIONS)
    return Entry(messages=_messages(body.get("messages")), output_tokens=_longest(body), options=options)


def _longest(request: dict[str, Any]) -> int | None:
    lengths = (_length(request, name) for name in _LIMITS)
    return next((length for length in lengths if length), None)


def _options(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}


def _only(prompt: Any) -> Any:
    """The only prompt of a list of prompts, which are texts or lists of ids."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], (str, list)):
        return prompt
    if len(prompt) > 1:
        raise _RefusedError("with several prompts")
    return prompt[0]


def _refuse_several_and_structured(body: dict[str, Any]) -> None:
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        raise _RefusedError("with n over 1")
    form = body.get("response_format")
    is_free = form is None or (isinstance(form, dict) and form.get("type") == "text")
    if not is_free or any(body.get(name) for name in _STRUCTURED):
        raise _RefusedError("with structured output")
    _refuse_own_ways(body)


def _refuse_own_ways(body: dict[str, Any]) -> None:
    """`vllm run-batch` takes a chat template only from its user."""
    given = body.get("chat_template_kwargs")
    if body.get("chat_template") or (isinstance(given, dict) and given.get("chat_template")):
        raise _RefusedError("with a chat template of their own")
    if body.get("truncate_prompt_tokens") is not None or body.get("suffix"):
        raise _RefusedError("with a suffix or a truncated prompt")


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise _BadLineError("its messages are not a list of objects")
    for message in value:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise _RefusedError("with images or other media")
    return value


def _of_sharegpt(turns: Any) -> Entry:
    """The first question, and the length of its answer."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadLineError("its conversations are not a list of objects")
    start = next((at for at, turn in enumerate(turns) if turn.get("from") in _HUMANS), None)
    answer = turns[start + 1] if start is not None and start + 1 < len(turns) else None
    if start is None or answer is None or answer.get("from") not in _MODELS:
        raise _BadLineError("its conversation has no question with an answer")
    return Entry(prompt=_text(turns[start].get("value"), "question"), output=_text(answer.get("value"), "answer"))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise _BadLineError(f"its {what} is not a text")
    return value


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(one) is int and one in _IDS for one in value):
        raise _BadLineError("its token ids are not a list of numbers")
    return value


def _length(document: dict[str, Any], name: str) -> int | None:
    """None if it is missing. A table may write 812.0."""
    value = document.get(name)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not (1 <= number <= MOST_TOKENS and number.is_integer()):
        raise _BadLineError(f"its {name} {_shown(value)} is not a number of tokens from 1 to {MOST_TOKENS}")
    return int(number)
