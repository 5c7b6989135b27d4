"""Turns the texts of a workload into token ids with vLLM's own tokenizer and the model's chat template.

    python -m batch_inference.measure.tokenizing <QUESTION     prints what `texts` reads, as lines of JSON

Chats become what `vllm run-batch` sends to its engine, the prompts of vLLM's custom data set and of ShareGPT what
`vllm bench` sends. Runs in its own process: vLLM (0.26 to 0.33) makes the tokenizer, whose memory is freed afterwards.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from batch_inference.core.config import ConfigError
from batch_inference.core.text import in_short, quoted
from batch_inference.core.workload import Entry, Workload
from batch_inference.measure.engine import parse_engine_flags
from batch_inference.measure.texts import WITHOUT_TEXTS

# How many are tokenized at a time: enough for all cores, with little memory.
_REQUESTS, _CHARACTERS = 256, 4 << 20
# Batches that may wait for the tokenizer while the chat template makes more.
_AHEAD = 2
# Its chats have no chat template: vLLM writes their tokens itself.
_HARMONY = "gpt_oss"
# The names of a tokenizer's files, for a folder in which vLLM found none.
_TOKENIZER_FILE = re.compile(r"token|vocab|merges|tekken|\.(model|gguf)$", re.IGNORECASE)


class _RefusedByVllmError(Exception):
    """Why vLLM would answer a request with an error, without a word of the request itself."""


@dataclass(slots=True)
class _Prompt:
    """A request on its way: ids if they are already known, otherwise a text for the tokenizer."""

    number: int  # of the entry, from 0
    place: str
    length: int | None = None  # if the file says it
    ids: list[int] | None = None
    text: str | None = None
    add_special_tokens: bool = True
    answer: str | None = None
    answer_tokens: int = 0


class Tokenizer:
    """vLLM's tokenizer, with what its OpenAI server does around it."""

    def __init__(self, model: str, engine_args: list[str], *, trust_remote_code: bool) -> None:
        """Raises ConfigError if vLLM finds no tokenizer."""
        given = parse_engine_flags(engine_args, may_cache_prefixes=True)
        self._flag = f"--tokenizer {given['tokenizer']}" if given.get("tokenizer") else f"--model {model}"
        try:
            self._renderer = _renderer({**given, "model": model, "trust_remote_code": trust_remote_code})
        except Exception as error:
            raise ConfigError(
                f"{self._flag}: {_why_none(given.get('tokenizer') or model, error)}; give --tokenizer (a folder or a "
                f"hub name), or {WITHOUT_TEXTS}, which needs none"
            ) from error
        self._tokenizer: Any = self._renderer.tokenizer
        self._is_mistrals = _is_mistrals(self._tokenizer)
        self.notes: list[str] = []

    # --- before the tokenizer ---

    def prompt_of(self, entry: Entry, number: int, place: str) -> _Prompt:
        """Raises ConfigError if a chat has no template, and _RefusedByVllmError."""
        prompt = _Prompt(number, place, answer=entry.output, answer_tokens=entry.output_tokens or 0)
        if entry.messages is not None:
            self._set_chat(prompt, entry)
        elif entry.prompt is not None:
            prompt.text = entry.prompt
            if entry.is_question:
                self._set_question(prompt, entry.prompt)
            prompt.add_special_tokens = entry.options.get("add_special_tokens", True) is not False
        else:
            prompt.length = entry.prompt_tokens
            prompt.ids = list(entry.prompt_token_ids) if entry.prompt_token_ids is not None else None
        if prompt.text is not None and not _is_unicode(prompt.text):
            raise _RefusedByVllmError("its text contains half a character (a lone surrogate)")
        return prompt

    def _set_chat(self, prompt: _Prompt, entry: Entry) -> None:
        """Like vLLM's OnlineRenderer.preprocess_chat."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        try:
            request = ChatCompletionRequest(model="", messages=list(entry.messages or ()), **entry.options)
            if self._renderer.model_config.hf_config.model_type == _HARMONY:
                prompt.ids = self._harmony_ids(request)
                return
            if self._is_mistrals:
                _as_mistral_wants_it(request)
            params = request.build_chat_params(None, "auto").with_defaults({"tokenize": self._is_mistrals})
            _, rendered = self._renderer.render_messages(request.messages, params)
        except Exception as error:
            # Whatever it raises, vLLM's server would answer the request with an error.
            if type(error).__name__ == "ChatTemplateResolutionError":
                raise self._no_template() from error
            raise _RefusedByVllmError(f"vLLM refuses its chat ({self._why(error)})") from error
        prompt.ids, prompt.text = rendered.get("prompt_token_ids"), rendered.get("prompt")
        prompt.add_special_tokens = request.add_special_tokens

    def _harmony_ids(self, request: Any) -> list[int]:
        from vllm.renderers.online_renderer import OnlineRenderer

        renderer = OnlineRenderer(
            self._renderer.model_config,
            self._renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        _, (rendered,) = renderer._make_request_with_harmony(request, should_include_tools=False)
        return list(rendered["prompt_token_ids"])

    def _set_question(self, prompt: _Prompt, text: str) -> None:
        """Like vLLM's CustomDataset, which puts every prompt into the chat template, with special tokens around it."""
        if self._has_no_template():
            self._note(f"{self._flag}: its tokenizer has no chat template; prompts are used as they are")
            return
        try:
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            raise _RefusedByVllmError(f"the chat template refuses its prompt ({self._why(error)})") from error
        prompt.text, prompt.ids = (rendered, None) if isinstance(rendered, str) else (None, list(rendered))

    def _has_no_template(self) -> bool:
        return not self._is_mistrals and not getattr(self._tokenizer, "chat_template", True)

    def _no_template(self) -> ConfigError:
        return ConfigError(
            f"{self._flag}: its tokenizer has no chat template, and a chat needs one; give --tokenizer (a folder "
            f"that has one, as chat_template.jinja), or {WITHOUT_TEXTS}"
        )

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _why(self, error: Exception) -> str:
        """Without a word of the request, which would otherwise end up in a log."""
        if hasattr(error, "errors") and callable(error.errors):  # pydantic's: which field, and what is wrong with it
            first = error.errors(include_input=False, include_context=False, include_url=False)[0]
            return f"{in_short('.'.join(map(str, first['loc'][:2])))}: {first['type']}"
        said = str(error)
        template = getattr(self._tokenizer, "chat_template", None)
        is_templates = isinstance(template, str) and said and said in template
        return quoted(said) if is_templates else type(error).__name__

    # --- the tokenizer ---

    def finish(self, prompts: list[_Prompt]) -> list[_Prompt]:
        """The same, with the tokens of all texts."""
        for special in (True, False):
            those = [prompt for prompt in prompts if prompt.text is not None and prompt.add_special_tokens is special]
            texts = [prompt.text for prompt in those]
            for prompt, ids in zip(those, self._ids(texts, add_special_tokens=special), strict=True):
                prompt.ids, prompt.text = ids, None
        answered = [prompt for prompt in prompts if prompt.answer]
        for prompt, ids in zip(answered, self._ids([prompt.answer for prompt in answered]), strict=True):
            prompt.answer, prompt.answer_tokens = None, len(ids)
        return prompts

    def _ids(self, texts: list[str | None], **how: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, **how)["input_ids"] if texts else []
        return ids


def _renderer(settings: dict[str, Any]) -> Any:
    """vLLM's own renderer, for a model with only text."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.registry import renderer_from_config

    if hasattr(EngineArgs, "language_model_only"):
        settings = {"language_model_only": True, **settings}
    model_config = EngineArgs(**{**settings, "skip_tokenizer_init": False}).create_model_config()
    # All it reads of a VllmConfig, for which vLLM would otherwise look for devices.
    parallel_config = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
    config = SimpleNamespace(
        model_config=model_config, parallel_config=parallel_config, observability_config=SimpleNamespace()
    )
    return renderer_from_config(config)


def _why_none(source: str, error: Exception) -> str:
    """Why texts have no tokenizer. For a folder without one, vLLM's own reason is about packages."""
    names = [path.name for path in Path(source).glob("*")]
    if names and not isinstance(error, ImportError) and not any(map(_TOKENIZER_FILE.search, names)):
        return "the folder holds no tokenizer (such as tokenizer.json), which the texts of --prompts-file need"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" :")
    return f"vLLM finds no tokenizer for texts ({in_short(reason)})"


def _is_mistrals(tokenizer: Any) -> bool:
    from vllm.utils.mistral import is_mistral_tokenizer

    return bool(is_mistral_tokenizer(tokenizer))


def _as_mistral_wants_it(request: Any) -> None:
    from vllm.tokenizers.mistral import maybe_serialize_tool_calls, truncate_tool_call_ids, validate_request_params

    maybe_serialize_tool_calls(request)
    truncate_tool_call_ids(request)
    validate_request_params(request)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- a whole file ---------------------------------------------------------------------------------------------------


def finished(workload: Workload, tokenizer: Tokenizer, wanted: set[int] | None) -> Iterator[list[_Prompt]]:
    """All entries of a workload, or those `wanted` (by their place among all entries returned), in order, some
    at a time. The tokenizer works on some while the chat template makes the next: it is not Python, and needs no lock.
    Entries that vLLM refuses are left out. Raises ConfigError."""
    waiting: deque[Future[list[_Prompt]]] = deque()
    with ThreadPoolExecutor(1) as executor:
        for batch in _batches(_prompts(workload, tokenizer, wanted)):
            waiting.append(executor.submit(tokenizer.finish, batch))
            if len(waiting) > _AHEAD:
                yield _usable(waiting.popleft().result(), workload)
        while waiting:
            yield _usable(waiting.popleft().result(), workload)


def _prompts(workload: Workload, tokenizer: Tokenizer, wanted: set[int] | None) -> Iterator[_Prompt]:
    last = max(wanted) if wanted else None
    for index, entry in enumerate(workload.entries()):
        if wanted is None or index in wanted:
            try:
                yield tokenizer.prompt_of(entry, workload.number, workload.place)
            except _RefusedByVllmError as error:
                workload.leave_out(workload.number, workload.place, str(error))
        if index == last:
            return


def _batches(prompts: Iterator[_Prompt]) -> Iterator[list[_Prompt]]:
    batch: list[_Prompt] = []
    characters = 0
    for prompt in prompts:
        batch.append(prompt)
        characters += len(prompt.text or "") + len(prompt.answer or "")
        if len(batch) == _REQUESTS or characters > _CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _usable(prompts: list[_Prompt], workload: Workload) -> list[_Prompt]:
    """Without prompts of no tokens, which no engine takes."""
    for prompt in prompts:
        if prompt.ids == []:
            workload.leave_out(prompt.number, prompt.place, "vLLM's tokenizer makes no tokens from its prompt")
    return [prompt for prompt in prompts if prompt.ids != []]


# --- the process ----------------------------------------------------------------------------------------------------


def _lines(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    workload = Workload(Path(asked["path"]), asked["skip_bad_lines"], set(asked["left_out"]))
    tokenizer = Tokenizer(asked["model"], asked["engine_args"], trust_remote_code=asked["trust_remote_code"])
    yield {"ready": True}
    wanted = asked["wanted"]
    for prompts in finished(workload, tokenizer, None if wanted is None else set(wanted)):
        if wanted is None:
            lengths = [prompt.length if prompt.ids is None else len(prompt.ids) for prompt in prompts]
            told = {"prompt_tokens": lengths, "output_tokens": [prompt.answer_tokens for prompt in prompts]}
        else:
            told = {"ids": [prompt.ids for prompt in prompts]}
        yield {**told, "bytes_read": workload.bytes_read}
    yield {
        "left_out": sorted(workload.left_out),
        "bad_lines": workload.bad_lines,
        "refused": dict(workload.refused),
        "notes": tokenizer.notes,
    }


def main() -> None:
    asked = json.load(sys.stdin)
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="true")
    # Anything else that is printed goes elsewhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            for line in _lines(asked):
                print(json.dumps(line), file=answers, flush=True)
        except ConfigError as error:
            print(json.dumps({"problem": str(error)}), file=answers)


if __name__ == "__main__":
    main()
