"""The process that makes tokens of texts, with a renderer and a tokenizer that stand in for vLLM's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ConfigError
from batch_inference.core.workload import Workload
from batch_inference.measure import tokenizing

PROTOCOL = "vllm.entrypoints.openai.chat_completion.protocol"
ONLINE = "vllm.renderers.online_renderer"
HELLO = [{"role": "user", "content": "hello you"}]


class Tokenizer:
    """A token for each word, of its length, behind a 0."""

    chat_template: str | None = "{{ raise_exception('no judge here') }}"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        self.calls.append(len(texts))
        return {"input_ids": [[0] * add_special_tokens + [len(word) for word in text.split()] for text in texts]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert (add_generation_prompt, tokenize) == (True, False)
        if "judge" in messages[0]["content"]:
            raise ValueError("no judge here")
        return f"{messages[0]['role']} {messages[0]['content']} now"


class Request:
    def __init__(self, *, messages: list[dict[str, str]], add_special_tokens: bool = False, **given: Any) -> None:
        assert given.pop("model") == ""
        self.messages, self.add_special_tokens, self.given = messages, add_special_tokens, given
        if "role" not in messages[0]:
            raise InvalidError

    def build_chat_params(self, template: None, content_format: str) -> Any:
        assert (template, content_format) == (None, "auto")
        return SimpleNamespace(with_defaults=lambda defaults: {**self.given, **defaults})


class InvalidError(ValueError):
    """As pydantic's."""

    def errors(self, **how: bool) -> list[dict[str, Any]]:
        assert how == {"include_input": False, "include_context": False, "include_url": False}
        return [{"loc": ("messages", 0, "a very secret role"), "type": "missing", "msg": "a secret"}]


class ChatTemplateResolutionError(ValueError):
    pass


class Renderer:
    def __init__(self, model_type: str = "llama") -> None:
        self.tokenizer = Tokenizer()
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
        self.seen: list[dict[str, Any]] = []

    def render_messages(self, messages: list[dict[str, str]], params: dict[str, Any]) -> tuple[None, dict[str, Any]]:
        self.seen.append(params)
        if self.tokenizer.chat_template is None:
            raise ChatTemplateResolutionError
        content = messages[0]["content"]
        if "judge" in content:
            raise ValueError("no judge here" if content == "judge" else f"what is {content}?")
        return None, {"prompt_token_ids": [9, 9]} if params["tokenize"] else {"prompt": content}


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Renderer:
    made = Renderer()
    monkeypatch.setattr(tokenizing, "_renderer", lambda _: made)
    monkeypatch.setattr(tokenizing, "_is_mistrals", lambda _: False)

    def parsed(words: Any, *, may_cache_prefixes: bool) -> dict[str, Any]:
        assert may_cache_prefixes
        return dict([words]) if words else {}

    monkeypatch.setattr(tokenizing, "parse_engine_flags", parsed)
    monkeypatch.setitem(sys.modules, PROTOCOL, SimpleNamespace(ChatCompletionRequest=Request))
    return made


def chat(messages: list[dict[str, str]], **body: Any) -> dict[str, Any]:
    return {"url": "/v1/chat/completions", "body": {"messages": messages, **body}}


def said(
    folder: Path, *documents: Any, skip: bool = False, left_out: Sequence[int] = (), wanted: list[int] | None = None
) -> list[dict[str, Any]]:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    asked = {"path": str(path), "skip_bad_lines": skip, "left_out": list(left_out), "model": "m", "engine_args": [],
             "trust_remote_code": False, "wanted": wanted}  # fmt: skip
    ready, *lines = tokenizing._lines(asked)
    assert ready == {"ready": True}
    return lines


def refusal(folder: Path, *documents: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        said(folder, *documents)
    return str(caught.value).replace(f"--prompts-file {folder / 'jobs.jsonl'}", "FILE")


ALL = [
    chat(HELLO, max_tokens=7),
    chat(HELLO, add_special_tokens=True, reasoning_effort="low"),
    {"prompt": "what is it", "output_tokens": 5},
    {"url": "/v1/completions", "body": {"prompt": "once upon"}},
    {"url": "/v1/completions", "body": {"prompt": "once upon", "add_special_tokens": False}},
    {"conversations": [{"from": "human", "value": "why ?"}, {"from": "gpt", "value": "because of it"}]},
    {"prompt_token_ids": [4, 5, 6, 7], "output_tokens": 1},
    {"prompt_tokens": 812, "output_tokens": 96},
]
IDS = [[5, 3], [0, 5, 3], [0, 4, 4, 2, 2, 3], [0, 4, 4], [4, 4], [0, 3, 1], [4, 5, 6, 7], None]


def test_each_kind_of_request(tmp_path: Path, renderer: Renderer) -> None:
    lengths, last = said(tmp_path, *ALL)
    assert lengths["prompt_tokens"] == [812 if ids is None else len(ids) for ids in IDS]
    assert lengths["output_tokens"] == [7, 0, 5, 0, 0, 4, 1, 96]
    assert lengths["bytes_read"] == (tmp_path / "jobs.jsonl").stat().st_size
    assert last == {"left_out": [], "bad_lines": 0, "refused": {}, "notes": []}
    assert renderer.seen == [{"tokenize": False}, {"reasoning_effort": "low", "tokenize": False}]


def test_ids_of_those_that_are_wanted_and_nothing_behind_them(tmp_path: Path, renderer: Renderer) -> None:
    ids, _ = said(tmp_path, *ALL, "no request", wanted=[0, 2, 5, 7])
    assert ids["ids"] == [IDS[0], IDS[2], IDS[5], IDS[7]]
    assert sum(renderer.tokenizer.calls) == 4  # the answer is one


def test_many_come_some_at_a_time_and_in_order(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"prompt": "a " * (number % 7 + 1)} for number in range(100)]
    expected = [number % 7 + 4 for number in range(100)]
    for name, most, batches in (("_REQUESTS", 8, 13), ("_CHARACTERS", 60, 12)):
        with monkeypatch.context() as patched:
            patched.setattr(tokenizing, name, most)
            *lengths, _ = said(tmp_path, *documents)
        assert [one for line in lengths for one in line["prompt_tokens"]] == expected
        assert len(lengths) >= batches
        assert lengths[0]["bytes_read"] <= lengths[-1]["bytes_read"]
    assert max(renderer.tokenizer.calls) <= 20


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (chat([{"role": "user", "content": "judge"}]), "vLLM refuses its chat ('no judge here')"),
        (chat([{"role": "user", "content": "secret judge"}]), "vLLM refuses its chat (ValueError)"),
        (chat([{"content": "secret"}]), "vLLM refuses its chat (messages.0: missing)"),
        ({"prompt": "secret judge"}, "the chat template refuses its prompt ('no judge here')"),
        ({"prompt": "secret \ud800"}, "its text contains half a character (a lone surrogate)"),
        (chat([{"role": "user", "content": " "}]), "vLLM's tokenizer makes no tokens from its prompt"),
    ],
)
def test_what_vllm_refuses_is_a_bad_line_and_nothing_of_it_is_said(
    tmp_path: Path, renderer: Renderer, document: Any, why: str
) -> None:
    assert renderer.seen == []
    assert refusal(tmp_path, ALL[0], document, ALL[2]) == (
        f"FILE, line 2: {why}; fix it, or leave it out with --skip-bad-lines"
    )
    lengths, last = said(tmp_path, ALL[0], document, ALL[2], skip=True)
    assert lengths["prompt_tokens"] == [2, 6]
    assert last == {"left_out": [1], "bad_lines": 1, "refused": {}, "notes": []}
    # What was left out has no place among what is wanted.
    ids, last = said(tmp_path, ALL[0], document, ALL[2], skip=True, left_out=[1], wanted=[1])
    assert ids["ids"] == [IDS[2]]
    assert last["bad_lines"] == 1


def test_bad_lines_and_other_kinds_are_counted_as_everywhere(tmp_path: Path, renderer: Renderer) -> None:
    documents = ({"prompt_tokens": 0}, {"url": "/v1/embeddings", "body": {}}, *ALL[:2])
    assert "line 1: its prompt_tokens '0' is not a number" in refusal(tmp_path, *documents)
    _, last = said(tmp_path, *documents, skip=True)
    assert last == {"left_out": [], "bad_lines": 1, "refused": {"for embeddings": 1}, "notes": []}
    assert len(renderer.seen) == 2


def test_without_a_chat_template_prompts_are_taken_as_they_are_and_chats_are_not(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    lengths, last = said(tmp_path, ALL[2], ALL[2])
    assert lengths["prompt_tokens"] == [4, 4]
    assert last["notes"] == ["--model m: its tokenizer has no chat template; prompts are used as they are"]
    assert refusal(tmp_path, ALL[0]).startswith("--model m: its tokenizer has no chat template, and a chat needs one; ")
    assert len(renderer.seen) == 1


def test_harmony_has_no_chat_template(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer.model_config.hf_config.model_type = "gpt_oss"
    made: list[dict[str, Any]] = []

    class Online:
        def __init__(self, model_config: Any, its_renderer: Any, **how: Any) -> None:
            assert (model_config, its_renderer) == (renderer.model_config, renderer)
            made.append(how)

        def _make_request_with_harmony(self, request: Request, *, should_include_tools: bool) -> Any:
            assert not should_include_tools
            return request.messages, [{"prompt_token_ids": [1, 2, 3]}]

    monkeypatch.setitem(sys.modules, ONLINE, SimpleNamespace(OnlineRenderer=Online))
    lengths, _ = said(tmp_path, ALL[0], ALL[1], ALL[2])
    assert lengths["prompt_tokens"] == [3, 3, 6]
    assert made[0] == {"request_logger": None, "chat_template": None, "chat_template_content_format": "auto"}


def test_mistrals_own_tokenizer_makes_ids_at_once(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []
    names = ("maybe_serialize_tool_calls", "truncate_tool_call_ids", "validate_request_params")
    mistral = SimpleNamespace(**{name: lambda request, name=name: seen.append((name, request)) for name in names})
    monkeypatch.setitem(sys.modules, "vllm.tokenizers.mistral", mistral)
    monkeypatch.setattr(tokenizing, "_is_mistrals", lambda _: True)
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda *_, **__: [7, 7, 7])
    lengths, _ = said(tmp_path, ALL[0], ALL[2])
    assert lengths["prompt_tokens"] == [2, 3]
    assert tuple(name for name, _ in seen) == names
    assert renderer.seen == [{"tokenize": True}]


@pytest.mark.parametrize(
    ("engine_args", "error", "begin"),
    [
        ([], OSError("no tokenizer in it:\nfor these reasons"), "--model m: vLLM finds no tokenizer for texts (no tok"),
        (["tokenizer", "t"], OSError(), "--tokenizer t: vLLM finds no tokenizer for texts (OSError); give --tokenizer"),
    ],
)
def test_a_model_without_a_tokenizer(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, engine_args: list[str], error: Exception, begin: str
) -> None:
    def fail(settings: dict[str, Any]) -> None:
        assert settings == {"model": "m", "trust_remote_code": True, **(dict([engine_args]) if engine_args else {})}
        raise error

    monkeypatch.setattr(tokenizing, "_renderer", fail)
    with pytest.raises(ConfigError) as caught:
        tokenizing.Tokenizer("m", engine_args, trust_remote_code=True)
    assert str(caught.value).startswith(begin)
    assert "\n" not in str(caught.value)
    assert renderer.seen == []


@pytest.mark.usefixtures("renderer")
@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("config.json", OSError("x"), "the folder holds no tokenizer (such as tokenizer.json), which the texts of "
                                      "--prompts-file need"),
        ("config.json", ImportError("x"), "vLLM finds no tokenizer for texts (x)"),
        *((name, OSError("x"), "vLLM finds no tokenizer for texts (x)") for name in (
            "tokenizer.json", "spiece.model", "vocab.txt", "tekken.json", "x.gguf", "qwen.tiktoken",
        )),
    ],
)  # fmt: skip
def test_a_folder_without_a_tokenizer_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, why: str
) -> None:
    def fail(_: dict[str, Any]) -> None:
        raise error

    (tmp_path / name).touch()
    monkeypatch.setattr(tokenizing, "_renderer", fail)
    for words, flag in (([], "--model"), (["tokenizer", str(tmp_path)], "--tokenizer")):
        with pytest.raises(ConfigError) as caught:
            tokenizing.Tokenizer(str(tmp_path) if not words else "m", words, trust_remote_code=True)
        assert str(caught.value) == (
            f"{flag} {tmp_path}: {why}; give --tokenizer (a folder or a hub name), or a --prompts-file of token ids "
            "(prompt_token_ids) or of lengths only (prompt_tokens), which needs none"
        )


def test_the_renderer_is_of_text_alone_and_has_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class EngineArgs:
        language_model_only = False

        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def create_model_config(self) -> dict[str, Any]:
            return self.settings

    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace(EngineArgs=EngineArgs))
    registry = SimpleNamespace(renderer_from_config=lambda config: config.model_config)
    monkeypatch.setitem(sys.modules, "vllm.renderers.registry", registry)
    given = {"model": "m", "skip_tokenizer_init": True}
    assert tokenizing._renderer(given) == {"language_model_only": True, "model": "m", "skip_tokenizer_init": False}
    del EngineArgs.language_model_only
    assert tokenizing._renderer(given) == {"model": "m", "skip_tokenizer_init": False}


def test_an_entry_that_is_left_out_is_counted_whenever_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "jobs"
    path.write_text('{"prompt_tokens": 1}\n{"prompt_tokens": 2}\n{"prompt_tokens": 3}\n')
    workload = Workload(path, skip_bad_lines=True, left_out={1})
    for _ in range(2):
        assert [entry.prompt_tokens for entry in workload.entries()] == [1, 3]
        assert workload.bad_lines == 1
