"""Result files with something wrong: a JSON document, changed at random places, or its text."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

TEXTS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))", "</style><script>alert(1)</script>", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)",
    "\t=1+1", "\r\n=2", "\x1b[31mRED\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\x00", "\x7f", "\u0085", "\u202eRTL",
    "\u2028line", "\ud800", "\ufeff", "a|b|c", "`x`", "$x$", "$\\frac{", "_a_", "\\", "{}", "%s%n", "", " ",
    "x" * 5000, "x" * 200_000, "\n\n# head", "''\"\"", "é漢字🎉", "nan", "-0", "../../etc/passwd",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, -0.0, 1e308, -1e308, 1e-320, 5e-324, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**400), 1.5, 0.1,
    1e16, True, False,
]  # fmt: skip
OTHERS: list[Any] = [None, [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": 1}}, [1, 2, 3], ["x"], [-1.0, 2.0]]
# What json would not write.
RAW = [
    "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "0x10",
    "01", "'x'", "undefined", '"\\ud83d"', "[1,]",
]  # fmt: skip
# Names that columns of ours have.
KEYS = [
    "setting", "group", "name", "batch_size", "latency_mean_s", "pareto", "file", "status", "=1+1", "<b>", "", "a,b",
    "\x1b[31m", "model", "index", "pipeline_parallel_size",
]  # fmt: skip
_RAW_MARK = "@raw@"


def mutated(document: Any, rng: random.Random) -> tuple[bytes, list[str]]:
    """The bytes of a file, and what was done to it."""
    document, done = copy.deepcopy(document), []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        change = rng.choice(_CHANGES)
        holder, key = _place(document, rng)
        # What does not fit the place is left out.
        with contextlib.suppress(TypeError, ValueError, OverflowError, KeyError, IndexError):
            done.append(f"{change.__name__.strip('_')} at {key!r:.40}")
            change(document, holder, key, rng)
    text = json.dumps(document)
    text = re.sub(f'"{_RAW_MARK}(\\d+)"', lambda found: RAW[int(found[1])], text)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        change_bytes = rng.choice(_BYTES)
        done.append(change_bytes.__name__.strip("_"))
        data = change_bytes(data, rng)
    return data, done


def _place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A holder and a key in it, by a walk from the top, so that shallow places are as likely as deep ones."""
    holder, key, here = document, next(iter(document)), document
    for _ in range(rng.randint(1, 6)):
        if not isinstance(here, (dict, list)) or not here:
            break
        holder, key = here, rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        here = holder[key]
    return holder, key


# --- changes of the document: the whole, the place, and the random numbers --------------------------------------------


def _delete(_document: Any, holder: Any, key: Any, _rng: random.Random) -> None:
    del holder[key]


def _replace(_document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = _anything(rng)


def _raw(_document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = f"{_RAW_MARK}{rng.randrange(len(RAW))}"


def _as_text(_document: Any, holder: Any, key: Any, _rng: random.Random) -> None:
    holder[key] = str(holder[key])


def _scale(_document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] *= rng.choice([-1, 0, 1e6, 1e300, 1e-300, 10**30])


def _repeat(_document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] += copy.deepcopy(rng.choices(holder[key], k=rng.randint(1, 3)))


def _cut(_document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key][rng.randrange(len(holder[key])) :]


def _wrap(_document: Any, holder: Any, key: Any, _rng: random.Random) -> None:
    value = holder[key]
    holder[key] = {str(place): item for place, item in enumerate(value)} if isinstance(value, list) else [value]


def _swap(document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    other, its_key = _place(document, rng)
    holder[key], other[its_key] = copy.deepcopy(other[its_key]), copy.deepcopy(holder[key])


def _add_key(document: Any, holder: Any, key: Any, rng: random.Random) -> None:
    for one in (holder, holder[key], document.get("config"), document.get("engine")):
        if isinstance(one, dict) and rng.random() < 0.5:
            one[rng.choice(KEYS)] = _anything(rng)


def _somewhere(document: Any, _holder: Any, _key: Any, rng: random.Random) -> None:
    """By the name of a key, so that what stands once is as likely as what each run has; of the kind that it was."""
    key, places = _places_of_a_key(document, rng)
    place = rng.choice(places)
    place[key] = _of_the_kind_of(place[key], rng)


def _everywhere(document: Any, _holder: Any, _key: Any, rng: random.Random) -> None:
    """The same in all points or runs."""
    key, places = _places_of_a_key(document, rng)
    value = _of_the_kind_of(places[0][key], rng)
    for place in places:
        place[key] = copy.deepcopy(value)


def _places_of_a_key(document: Any, rng: random.Random) -> tuple[str, list[Any]]:
    """A key, and all that have it. Texts are as likely as numbers, of which there are more."""
    kinds, waiting = dict[type, dict[str, list[Any]]](), [document]
    while waiting:
        here = waiting.pop()
        for key, value in here.items() if isinstance(here, dict) else ():
            kinds.setdefault(type(value), {}).setdefault(key, []).append(here)
        waiting += [one for one in (here.values() if isinstance(here, dict) else here) if isinstance(one, (dict, list))]
    places = kinds[rng.choice([kind for kind in (str, str, int, float, list) if kind in kinds])]
    key = rng.choice(list(places))
    return key, places[key]


def _of_the_kind_of(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, list):
        return value[: rng.randrange(len(value))] if value else [rng.choice(TEXTS)]
    return rng.choice(NUMBERS) if isinstance(value, (int, float)) else _anything(rng)


def _anything(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(rng.choice([TEXTS, NUMBERS, NUMBERS, OTHERS])))


_CHANGES: list[Callable[[Any, Any, Any, random.Random], None]] = [
    _delete, _replace, _replace, _raw, _as_text, _scale, _repeat, _cut, _wrap, _swap, _add_key,
    *[_somewhere] * 4, *[_everywhere] * 3,
]  # fmt: skip


# --- changes of the bytes -----------------------------------------------------------------------------------------


def _ends_early(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _key_twice(data: bytes, _rng: random.Random) -> bytes:
    return re.sub(rb'"(batch_size|status|points|config|latency_s)": ', rb'"\1": 0, \g<0>', data, count=2)


def _around(data: bytes, rng: random.Random) -> bytes:
    before, after = rng.choice([(b"\xef\xbb\xbf", b""), (b"", b"garbage"), (b"", b"\0" * 100), (data, b"")])
    return before + data + after


def _other_encoding(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"a", b"\xe4", 1) if rng.random() < 0.5 else data.decode("utf-8", "replace").encode("utf-16")


def _something_else(_data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b" ", b"null", b"[]", b"{}", b"1", b'"x"'])


_BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    _ends_early, _flipped, _key_twice, _around, _other_encoding, _something_else,
]  # fmt: skip
