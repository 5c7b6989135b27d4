"""What is a secret, and what is written in its place. Only this module decides. Needs only Python's own library.

A secret is a value whose name says so, wherever it stands: after a flag, in JSON, in a variable, in a URL. In all that
is written, its name replaces it, like <hf_token>; only the engine gets the value. Replacing twice changes nothing
more.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

# The name of a secret and its value -> what is written in its place.
Swap = Callable[[str, str], str]

# --- names ------------------------------------------------------------------------------------------------------------

# AWSAccessKeyId -> AWS Access Key Id
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SHOWN_WORD = re.compile(r"[A-Z0-9]+(?![a-z])|[A-Z]?[a-z0-9]+")
# Anywhere in a name whose words are joined by _.
_SECRET_WORDS = re.compile(
    r"secret|passw(?:or)?d|passphrase|passcode|credential|authori[sz]ation|bearer"
    r"|(?:api|access|private)_?keys?(?![a-z])"
    r"|(?<![a-z])(?:account|auth|client|encryption|license|master|service|session|shared|signing|ssh|storage)_?keys?(?![a-z])"
    r"|(?<![a-z])(?:access|api|auth|bearer|hf|hub|refresh|security|session)_?tok(?:en)?s?(?![a-z])"
)
_SECRET_LAST = frozenset({"auth", "cookie", "cookies", "cred", "creds", "jwt", "pwd", "sig", "signature"})
# "token" and "key" as last words mean a secret, unless one of these words comes before: texts and caches have them too.
_TEXT_TOKENS = """
    action assistant audio begin blank boa boi bonus bos class cls decode decoder draft each end eod eoi eom eos eot
    extra fake first image img input language last mask max message middle min new newline next num output pad patch per
    placeholder prefix prefill prev prompt reasoning register row sample sep sos special speech start stop suffix task
    text think thinking timestamp tool total unk video vision
"""
_PLAIN_KEYS = """
    attention cache column config dataset dict foreign group hash head index json kv layer map metric model param
    parameter partition primary query rope routing row sort state weight
"""
_PLAIN_BEFORE = {"token": frozenset(_TEXT_TOKENS.split()), "key": frozenset(_PLAIN_KEYS.split())}
# Words before "pass" that make it a password; an optimiser makes passes too.
_PASS_OF = frozenset({"admin", "basic", "database", "db", "http", "login", "proxy", "redis", "root", "smtp", "user"})
# NoCredentialsError is not a secret.
_SAYS_WHAT_IS_WRONG = frozenset({"error", "errors", "exception", "warning"})
# Switches, missing values, and the stand-in for a value in --help.
_NO_VALUE = frozenset({"", "none", "null", "true", "false", "word"})


def is_secret_name(name: str) -> bool:
    """Whether the value of a flag, key or variable with this name is a secret. --hf-overrides.token sets a part."""
    return any(_is_secret_word(_words_of(part)) for part in name.split("."))


def placeholder(name: str) -> str:
    """--hf-token -> <hf_token>"""
    return f"<{'_'.join(_SHOWN_WORD.findall(name.rpartition('.')[2])).lower()[:60] or 'secret'}>"


def _words_of(name: str) -> list[str]:
    return [word.lower() for word in _NAME_WORD.findall(name)]


def _is_secret_word(words: Sequence[str]) -> bool:
    if not words or words[-1] in _SAYS_WHAT_IS_WRONG:
        return False
    if _SECRET_WORDS.search("_".join(words)):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else None
    if last in _PLAIN_BEFORE:
        return before not in _PLAIN_BEFORE[last]
    return last in _SECRET_LAST or (last == "pass" and (before is None or before in _PASS_OF))


# --- what is written --------------------------------------------------------------------------------------------------


def redact(words: Sequence[str]) -> list[str]:
    """The words of a command line, with a placeholder for each secret."""
    return list(_swapped_words(words, _by_name))


def redact_value(value: str) -> str:
    """A value whose name does not mark it as secret: JSON, a URL, or a name."""
    return _swapped_value(value, _by_name)


def redact_text(text: str) -> str:
    """A line of a log or a message; secrets that this process knows are replaced too, wherever they stand."""
    for value, name in _known.items():
        text = text.replace(value, placeholder(name))
    return _swapped_text(text, _by_name)


def placeholders(words: Sequence[str]) -> list[str]:
    """The placeholders that `redact` puts into the words, each once, in order."""
    found: dict[str, None] = {}

    def keep(name: str, value: str) -> str:
        found[placeholder(name)] = None
        return value

    list(_swapped_words(words, keep))
    return list(found)


def left_placeholder(words: Sequence[str]) -> str | None:
    """A placeholder that was not replaced by a value."""
    left: list[str] = []

    def look(name: str, value: str) -> str:
        left.extend([value] if value == placeholder(name) else [])
        return value

    list(_swapped_words(words, look))
    return left[0] if left else None


def _by_name(name: str, _value: str) -> str:
    return placeholder(name)


# --- what this process knows ------------------------------------------------------------------------------------------

# Shorter ones occur in other words by chance.
_SHORTEST = 8
# value -> name, the longest first
_known: dict[str, str] = {}


def remember(words: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """From now on, hide the secrets of a command line and of variables in every text, whatever comes before them."""
    found: dict[str, str] = {}

    def keep(name: str, value: str) -> str:
        if value != placeholder(name):
            found.update(dict.fromkeys(_spellings(value), name))
        return value

    list(_swapped_words(words, keep))
    for name, value in (variables or {}).items():
        # PWD is a folder. The path of a secret's file is not a secret: it would be hidden in every line.
        if is_secret_name(name) and name not in ("PWD", "OLDPWD") and not _is_path(value):
            keep(name, value)
        else:
            _swapped_value(value, keep)
    found.update(_known)
    _known.clear()
    _known.update(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))


def _spellings(value: str) -> set[str]:
    """The ways it may be spelled in a text; for user:password, also the password."""
    values = {value, *([value.partition(":")[2]] if ":" in value else [])}
    ways = (str, unquote, partial(quote, safe=""), lambda text: json.dumps(text)[1:-1])
    return {spelt for one in values for way in ways if len(spelt := way(one)) >= _SHORTEST}


def _is_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


# --- words of a command line ------------------------------------------------------------------------------------------

# What a value that begins with a dash does not look like: a long flag, or a short flag of vLLM or of ours.
_PART = r"[a-z]+\d{0,2}[a-z]*"
_FLAG = re.compile(
    rf"--{_PART}(?:[-_]{_PART})*(?:\.[\w.+-]+)?\+?(?:=.*)?"
    r"|-(?:tp|pp|dp[a-z]?|dcp|pcp|[acds]c|ep|[hnqr])(?:[=.].*)?",
    re.DOTALL,
)


def dashed_secret(words: Sequence[str]) -> str | None:
    """A flag whose value is a separate word that begins with a dash, which no parser accepts as a value."""
    for flag, value in itertools.pairwise(words):
        if _opens_secret(flag) and value.startswith("-") and not _FLAG.fullmatch(value):
            return flag
    return None


def _opens_secret(word: str) -> bool:
    return word.startswith("-") and "=" not in word and is_secret_name(word)


def follows_secret(words: Sequence[str], place: int) -> str | None:
    """The flag that takes the secret at `place`, if there is one."""
    return words[place - 1] if place and _opens_secret(words[place - 1]) else None


def _swapped_words(words: Sequence[str], swap: Swap) -> Iterator[str]:
    name: str | None = None  # of the secret whose values come next
    before = ""
    for word in words:
        may_be_dashed = word.startswith("-") and _opens_secret(before) and not _FLAG.fullmatch(word)
        before = word
        if name is not None and (may_be_dashed or not word.startswith("-")):
            yield _secret(name, word, swap)
        elif word.startswith("-"):
            flag, equals, value = word.partition("=")
            name = flag if is_secret_name(flag) else None
            new = value if not equals else _secret(name, value, swap) if name else _swapped_value(value, swap)
            yield f"{_swapped_text(flag, swap)}{equals}{new}"
        else:
            yield _swapped_value(word, swap)


def _secret(name: str, value: str, swap: Swap) -> str:
    return value if value.casefold() in _NO_VALUE else swap(name, value)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _swapped_value(text: str, swap: Swap) -> str:
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return _swapped_text(text, swap)
    try:
        document = json.loads(text)
        new = _swapped_json(document, swap)
        return text if new == document else json.dumps(new, ensure_ascii=False)
    except (ValueError, RecursionError):
        return _swapped_text(text, swap)


def _swapped_json(value: Any, swap: Swap, name: str | None = None) -> Any:
    """`name`: of the secret that this is part of."""
    if isinstance(value, dict):
        return {
            _swapped_text(key, swap): _swapped_json(item, swap, name or (key if is_secret_name(key) else None))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_swapped_json(item, swap, name) for item in value]
    if name is not None and value is not None and not isinstance(value, bool):
        return _secret(name, str(value), swap)
    return _swapped_value(value, swap) if isinstance(value, str) else value


# --- text -------------------------------------------------------------------------------------------------------------

# Between :// and @. A password may contain a slash, but host:port does not begin one. A path has lost a slash.
_LOGIN = re.compile(
    r'(?<=://)(?:[^\s/?#"]+(?=@)|[^\s/?#@:\["]+:(?!\d{1,5}(?:[/?#]|$))[^\s"@]+(?=@))|(?<=:/)[^\s/?#@:"]+:[^\s/@"]+(?=@)'
)
_LOGIN_ALONE = re.compile(r"""(?<![\w/.:@<-])[\w.+-]+:[^\s:@/"',]+(?=@[\w\[])""")
_IN_QUERY = re.compile(r"""([?&#;])([\w.~%-]+)=([^\s&#"']+)""")
_BEARER = re.compile(r"""(?i)\b(bearer|basic)(\s+)([\w.~+/=-]{8,})""")
# Tokens with a telling form: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google, and JWT.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)
# A name that is not a folder in a path, and what separates it from its value; after a flag this may be a space.
_NAMED = re.compile(
    r"""(?<![\w./-])(?P<quote>\\*["']?)(?P<name>-{0,2}[A-Za-z][\w.-]{0,80})\+?(?P=quote)"""
    r"""(?:\s*(?P<sign>=|:(?!//))\s*|(?<=[\w+])\s+)"""
)
_VALUE = re.compile(
    r"""\\+".*?\\+"|"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}?|\[[^\[\]]*\]?|[^\s"',;&)}\]]+"""
)
# A word of a sentence, as in "--hf-token needs a value" and "Invalid password: try again".
_PROSE = re.compile(r"[A-Za-z]?[a-z]+[.:!?]*|…\W*")


def _swapped_text(text: str, swap: Swap) -> str:
    if "@" in text:
        text = _LOGIN.sub(lambda found: swap("login", found[0]), text)
        text = _LOGIN_ALONE.sub(lambda found: swap("login", found[0]), text)
    text = _IN_QUERY.sub(lambda found: _in_query(found, swap), text)
    text = _TOKEN.sub(lambda found: swap("token", found[0]), text)
    text = _BEARER.sub(lambda found: _bearer(found, swap), text)
    return "".join(_pieces(text, swap))


def _in_query(found: re.Match[str], swap: Swap) -> str:
    sign, name, value = found.groups()
    return f"{sign}{name}={_secret(name, value, swap)}" if is_secret_name(name) else found[0]


def _pieces(text: str, swap: Swap) -> Iterator[str]:
    """The text, with what follows the names of secrets replaced."""
    done = 0
    while named := _NAMED.search(text, done):
        yield text[done : named.end()]
        done = named.end()
        if _is_name_in_text(named) and (value := _VALUE.match(text, done)) and not _is_prose(named, value[0]):
            yield _swapped_quoted(named["name"], value[0], swap)
            done = value.end()
    yield text[done:]


def _is_name_in_text(named: re.Match[str]) -> bool:
    # In a text a bare "key" is usually a dictionary's, and only a flag has its value after a space.
    name = named["name"]
    return name != "key" and (bool(named["sign"]) or name.startswith("-")) and is_secret_name(name)


def _is_prose(named: re.Match[str], value: str) -> bool:
    if named["sign"] == "=" or named["quote"]:
        return False
    return bool(_PROSE.fullmatch(value)) or (named["sign"] is None and value.startswith("-"))


def _bearer(found: re.Match[str], swap: Swap) -> str:
    scheme, space, value = found.groups()
    return found[0] if _PROSE.fullmatch(value) else f"{scheme}{space}{swap(scheme, value)}"


def _swapped_quoted(name: str, value: str, swap: Swap) -> str:
    """The replacement in the value's own quotes."""
    opening = (re.match(r"""\\*["']""", value) or [""])[0]
    inner = value[len(opening) :].removesuffix(opening) if opening else value
    return f"{opening}{_secret(name, inner, swap)}{opening}"
