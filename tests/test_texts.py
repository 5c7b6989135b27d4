"""How long the requests of a workload are, and their token ids: read, or made by vLLM, which is asked once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core import child
from batch_inference.core.child import ChildError
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.workload import Workload
from batch_inference.measure import texts
from batch_inference.measure.texts import Lengths, ids_of, lengths_of
from conftest import REPOSITORY, STUB

END = {"left_out": [], "bad_lines": 0, "refused": {}, "notes": []}
Vllm = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """What the child says in turn, an exception being raised; and what it is asked."""
    monkeypatch.setattr(texts, "vllm_folder", lambda: Path("/no/vllm"))
    monkeypatch.setattr(texts, "vllm_version", lambda: "0.32.0")

    def says(*lines: dict[str, Any] | ChildError) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def answer(module: str, question: str, *, silence_s: float) -> Iterator[Any]:
            assert (module, silence_s) == ("measure.tokenizing", 600.0)
            asked.append(json.loads(question))
            for line in lines:
                if isinstance(line, ChildError):
                    raise line
                yield line

        monkeypatch.setattr(child, "ask_for_a_stream", answer)
        return asked

    return says


def workload_of(folder: Path, *documents: Any, skip: bool = False) -> Workload:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return Workload(path, skip)


def config_of(folder: Path, **fields: Any) -> ExperimentConfig:
    (folder / "model").mkdir(exist_ok=True)
    return ExperimentConfig(model=str(folder / "model"), **fields)


def lengths(workload: Workload, config: ExperimentConfig) -> tuple[list[int], list[int]]:
    found = lengths_of(workload, config, [].append)
    return list(found.prompt_tokens), list(found.output_tokens)


def no_reading(*_: object) -> Any:
    raise AssertionError("the file is read again")


LENGTHS = ({"prompt_tokens": 7, "output_tokens": 5}, {"prompt_token_ids": [3, 4, 5]}, {"prompt_tokens": 2})
TEXT = {"prompt": "hello", "output_tokens": 5}


# --- without texts --------------------------------------------------------------------------------------------------


def test_lengths_and_ids_need_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_lines", no_reading)
    workload, config = workload_of(tmp_path, *LENGTHS), config_of(tmp_path)
    found = lengths_of(workload, config, no_reading)
    assert (found.prompt_tokens, found.output_tokens) == (array("I", [7, 3, 2]), array("I", [5, 0, 0]))
    assert ids_of(workload, config, [2, 1, 0, 1]) == [None, [3, 4, 5], None, [3, 4, 5]]


def test_the_hash_is_of_the_content_and_of_how_bad_lines_are_taken(tmp_path: Path) -> None:
    def content_hash(*documents: Any, skip: bool = False) -> str:
        found = lengths_of(workload_of(tmp_path, *documents, skip=skip), config_of(tmp_path), [].append)
        assert isinstance(found, Lengths)
        return found.content_hash

    hashes = [content_hash(*LENGTHS), content_hash(*LENGTHS, skip=True), content_hash(*LENGTHS[:2])]
    assert len(set(hashes)) == 3
    assert hashes == [content_hash(*LENGTHS), content_hash(*LENGTHS, skip=True), content_hash(*LENGTHS[:2])]


def test_what_was_found_is_kept_with_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(tmp_path, *LENGTHS, {"prompt_tokens": 0}, {"url": "/v1/embeddings", "body": {}}, skip=True)
    config = config_of(tmp_path)
    found, told = lengths(workload, config), workload.told()
    assert told is not None
    assert "1 for embeddings, 1 bad line" in told
    assert ids_of(workload, config, [0]) == [None]
    assert workload.told() == told
    monkeypatch.setattr(Workload, "entries", no_reading)
    again = Workload(workload.path, skip_bad_lines=True)
    assert (lengths(again, config), again.told()) == (found, told)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"prompt_tokens": "?", "output_tokens": "?"}', '{"prompt_tokens": "eJwDAAAAAAE=",'
     ' "output_tokens": "eJwDAAAAAAE=", "left_out": [], "bad_lines": 0, "refused": {}, "notes": []}'],
)  # fmt: skip
def test_an_unusable_answer_that_was_kept_is_found_anew(tmp_path: Path, content: str) -> None:
    config = config_of(tmp_path)
    found = lengths(workload_of(tmp_path, *LENGTHS), config)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(content)
    assert lengths(workload_of(tmp_path, *LENGTHS), config) == found == ([7, 3, 2], [5, 0, 0])
    assert kept.read_text() != content


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it cannot be read \(No such file or directory\); give a file"):
        lengths(Workload(tmp_path / "none"), config_of(tmp_path))


# --- with texts, the child being played -----------------------------------------------------------------------------


def test_texts_go_through_vllm_once_for_all_settings(tmp_path: Path, vllm: Vllm) -> None:
    left_out = {"left_out": [1], "bad_lines": 1, "refused": {"for embeddings": 2}, "notes": ["no template"]}
    asked = vllm(
        {"ready": True},
        {"prompt_tokens": [4, 9], "output_tokens": [5, 0], "bytes_read": 10},
        {"prompt_tokens": [2], "output_tokens": [1], "bytes_read": 20},
        left_out,
    )
    workload = workload_of(tmp_path, LENGTHS[0], TEXT, skip=True)
    flags = ("--tokenizer-mode", "slow", "--enable-expert-parallel")
    config = config_of(tmp_path, trust_remote_code=True, engine_args=flags)
    said: list[str] = []
    found = lengths_of(workload, config, said.append)
    assert (list(found.prompt_tokens), list(found.output_tokens)) == ([4, 9, 2], [5, 0, 1])
    begin = f"note: vLLM 0.32.0 tokenizes the texts of {workload.path}, once; importing it takes several seconds"
    assert said == [begin, "note: no template"]
    question = {
        "path": str(workload.path), "skip_bad_lines": True, "left_out": [], "model": config.model,
        "trust_remote_code": True, "engine_args": list(flags), "wanted": None,
    }  # fmt: skip
    assert asked == [question]
    # Another setting: other devices, another way with experts, and prefixes that are cached.
    again, said = Workload(workload.path, skip_bad_lines=True), []
    other = config_of(
        tmp_path, trust_remote_code=True, engine_args=(*flags[:2], "--enable-prefix-caching"), tensor_parallel_size=2
    )
    assert lengths_of(again, other, said.append) == found
    assert (len(asked), said) == (1, ["note: no template"])
    assert (again.left_out, again.told()) == ({1}, workload.told())


def test_another_tokenizer_is_asked_again(tmp_path: Path, vllm: Vllm) -> None:
    asked = vllm({"ready": True}, {"prompt_tokens": [4], "output_tokens": [5], "bytes_read": 10}, END)
    workload, config = workload_of(tmp_path, TEXT), config_of(tmp_path)
    counts = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: (tmp_path / "model" / "tokenizer.json").write_text("{}"),
        lambda: (tmp_path / "model" / "tokenizer.json").write_text("{ }"),
        lambda: (tmp_path / "model" / "chat_template.jinja").write_text("x"),
        lambda: None,
    ):
        change()
        lengths(workload, config)
        counts.append(len(asked))
    assert counts == [1, 1, 2, 3, 4, 4]
    for fields in ({"trust_remote_code": True}, {"engine_args": ("--tokenizer", "other")}, {"model": "org/name"}):
        lengths(workload, ExperimentConfig(**{"model": config.model, **fields}))
    assert len(asked) == 7


def test_a_model_of_the_hub_is_known_by_its_snapshots(
    tmp_path: Path, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = vllm({"ready": True}, {"prompt_tokens": [4], "output_tokens": [5], "bytes_read": 10}, END)
    workload, config = workload_of(tmp_path, TEXT), ExperimentConfig(model="org/name")
    for snapshot, count in (("1", 1), ("1", 1), ("2", 2), ("2", 2)):
        (tmp_path / "hub" / "models--org--name" / "snapshots" / snapshot).mkdir(parents=True, exist_ok=True)
        lengths(workload, config)
        assert len(asked) == count


def test_ids_are_asked_for_once_and_in_any_order(tmp_path: Path, vllm: Vllm) -> None:
    workload, config = workload_of(tmp_path, *[TEXT] * 5), config_of(tmp_path)
    asked = vllm({"ready": True}, {"ids": [[1], None], "bytes_read": 5}, {"ids": [[3, 3]], "bytes_read": 9}, END)
    assert ids_of(workload, config, [3, 0, 2, 3]) == [[3, 3], [1], None, [3, 3]]
    asked += vllm({"ready": True}, {"ids": [[4]], "bytes_read": 9}, END)
    assert ids_of(workload, config, [2, 0]) == [None, [1]]
    assert ids_of(workload, config, [0, 4]) == [[1], [4]]
    assert [question["wanted"] for question in asked] == [[0, 2, 3]]


def test_what_vllm_refuses_is_what_the_user_reads(tmp_path: Path, vllm: Vllm) -> None:
    vllm({"ready": True}, {"problem": "--prompts-file x, line 3: bad"})
    with pytest.raises(ConfigError, match=r"^--prompts-file x, line 3: bad$"):
        lengths(workload_of(tmp_path, TEXT), config_of(tmp_path))
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([ChildError("no answer within 600 s")], "no answer within 600 s"),
        ([ChildError("ImportError: no libx")], "ImportError: no libx"),
        ([{"ready": True}, ChildError("PanicException: inside of `a secret`")], "PanicException"),
        ([{"ready": True}, ChildError("!")], "no reason"),
    ],
)
def test_a_tokenizer_that_fails_says_nothing_of_the_texts(
    tmp_path: Path, vllm: Vllm, lines: list[Any], reason: str
) -> None:
    vllm(*lines)
    workload = workload_of(tmp_path, TEXT)
    with pytest.raises(WorkFailedError) as caught:
        lengths(workload, config_of(tmp_path))
    assert str(caught.value) == f"--prompts-file {workload.path}: vLLM 0.32.0 could not tokenize its texts ({reason})"


def test_a_file_that_has_changed_since_is_not_measured(tmp_path: Path, vllm: Vllm) -> None:
    config = config_of(tmp_path)
    for documents, others in ((LENGTHS, (*LENGTHS, TEXT)), ([TEXT] * 2, [TEXT] * 3)):
        vllm({"ready": True}, {"ids": [[1]], "prompt_tokens": [1], "output_tokens": [1], "bytes_read": 5}, END)
        workload = workload_of(tmp_path, *documents)
        lengths(workload, config)
        for index in (0, 5):
            workload_of(tmp_path, *others)
            with pytest.raises(WorkFailedError, match="it has changed since its lengths were read; start again"):
                ids_of(workload, config, [index])


def test_a_vllm_without_what_is_needed_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the stub renders nothing."""
    monkeypatch.setattr(texts, "vllm_folder", lambda: STUB / "vllm")
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    config = config_of(tmp_path)
    with pytest.raises(ConfigError) as caught:
        lengths(workload_of(tmp_path, TEXT), config)
    begin = f"--model {config.model}: vLLM finds no tokenizer for texts (No module named 'vllm."
    assert str(caught.value).startswith(begin)


def test_texts_where_vllm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "vllm_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed here; give a --prompts-file of token ids \(prompt_"):
        lengths(workload_of(tmp_path, TEXT), config_of(tmp_path))


def test_a_bar_on_a_terminal_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_LOOK", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown: list[int] = []
    monkeypatch.setattr("tqdm.tqdm.refresh", lambda bar, *_, **__: shown.append((bar.n, bar.total)))
    workload = workload_of(tmp_path, *LENGTHS * 2000)
    lengths(workload, config_of(tmp_path))
    size = workload.path.stat().st_size
    assert len(shown) >= 6000
    assert shown == sorted(shown)
    assert {total for _, total in shown} == {size}
    assert shown[-1][0] == size


# --- by the real vLLM -----------------------------------------------------------------------------------------------

# Whatever role it does not know, it refuses by words of its own.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "judge" -%}{{- raise_exception("there is no judge here") -}}{%- endif -%}
{{- "<|" + message.role + "|>" + message.content -}}
{%- endfor -%}
{%- for document in documents or [] -%}{{- document.text -}}{%- endfor -%}
{{- mood or "" -}}{{- reasoning_effort or "" -}}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""
TURNS = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "Why is the sky blue? Größe, 漢字, 🙂\n\n  <s> twice"},
    {"role": "assistant", "content": "It scatters"},
]


def chat(messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    return {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": messages, "max_tokens": 7, **body}}  # fmt: skip


def completion(prompt: Any, **body: Any) -> dict[str, Any]:
    return {"custom_id": "2", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}


# What the server of vLLM takes, in every way that changes tokens.
SERVED = [
    chat(TURNS[:2]),
    chat(TURNS),
    chat(TURNS, add_generation_prompt=False, continue_final_message=True),
    chat(TURNS[:1], add_generation_prompt=False),
    chat(TURNS[:2], add_special_tokens=True),
    chat(TURNS[:2], chat_template_kwargs={"mood": " be merry", "enable_thinking": True}),
    chat(TURNS[:2], documents=[{"title": "a", "text": " of the sky"}], reasoning_effort="low"),
    chat([{"role": "user", "content": [{"type": "text", "text": "in"}, {"type": "text", "text": "parts"}]}]),
    chat([{"role": "developer", "content": "Be brief."}, *TURNS[1:2]]),
    completion("Once upon a time"),
    completion("Once upon a time", add_special_tokens=False),
    completion([5, 6, 7]),
    completion(["  the only one "]),
]
CUSTOM = [{"prompt": "What is the capital of India?", "output_tokens": 9}, {"prompt": " x <s>\n", "output_tokens": 2}]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for question, answer in (
        ("Why are they blue?", "So it is, my dear."),
        ("And where,\n and when?", "Now, and over there."),
    )
]


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a tokenizer of bytes, which puts <s> before every text unless told not to."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("small")
    shutil.copy(REPOSITORY / "models" / "tiny-llama" / "config.json", folder)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = {word: number for number, word in enumerate(["<s>", "</s>", *sorted(alphabet), "th", "the"])}
    model = tokenizers.models.BPE(vocab=words, merges=[("t", "h"), ("th", "e")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    says = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def by_vllm_itself(model: str, folder: Path) -> list[list[int]]:
    """As vLLM's server and its benchmark make them."""
    files = [folder / "served.jsonl", folder / "custom.jsonl", folder / "sharegpt.json"]
    for file, documents in zip(files, (SERVED, CUSTOM), strict=False):
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files[2].write_text(json.dumps(SHAREGPT))
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "served_ids.py", model, *files], capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.vllm
@pytest.mark.parametrize("model", ["small_tokenizer", "real_model"])
def test_ids_are_those_that_vllm_sends(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(model)
    workload, config = workload_of(tmp_path, *SERVED, *CUSTOM, *SHAREGPT), ExperimentConfig(model=model)
    prompts, outputs = lengths(workload, config)
    found = ids_of(workload, config, range(len(prompts)))
    expected = by_vllm_itself(model, tmp_path)
    served, benchmarked = expected[: len(SERVED)], expected[len(SERVED) :]
    assert found == [*served, *(ids[:-1] for ids in benchmarked)]
    assert prompts == [len(ids or ()) for ids in found]
    assert outputs == [7] * 9 + [0] * 4 + [ids[-1] for ids in benchmarked]


@pytest.mark.vllm
def test_what_vllm_would_answer_with_an_error_is_a_bad_line(small_tokenizer: str, tmp_path: Path) -> None:
    documents = [
        chat([{"role": "judge", "content": "a secret"}]),
        chat([{"content": "a secret"}]),
        chat(TURNS, continue_final_message=True, add_generation_prompt=True),
        completion("a secret\ud800"),
        completion("\n", add_special_tokens=False),  # this is none
    ]
    config = ExperimentConfig(model=small_tokenizer)
    workload = workload_of(tmp_path, CUSTOM[0], *documents, CUSTOM[0], skip=True)
    prompts, _ = lengths(workload, config)
    assert prompts == [prompts[0], 1, prompts[0]]
    assert workload.told() == f"--prompts-file {workload.path}: left out: 4 bad lines"
    # Their places are those without what was left out.
    first, second, third = ids_of(workload, config, [0, 1, 2])
    assert first == third != second
    with pytest.raises(ConfigError) as caught:
        lengths(workload_of(tmp_path, CUSTOM[0], documents[0], *SERVED), config)
    why = "line 2: vLLM refuses its chat ('there is no judge here'); fix it, or leave it out with --skip-bad-lines"
    assert str(caught.value) == f"--prompts-file {workload.path}, {why}"


@pytest.mark.vllm
def test_texts_without_a_tokenizer_or_a_template(small_tokenizer: str, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(small_tokenizer, without)
    (without / "chat_template.jinja").unlink()
    tiny = str(REPOSITORY / "models" / "tiny-llama")
    said: list[str] = []
    config = ExperimentConfig(model=tiny, engine_args=("--tokenizer", str(without)))
    found = lengths_of(workload_of(tmp_path, CUSTOM[0]), config, said.append)
    assert list(found.prompt_tokens) == [len("<") + len(CUSTOM[0]["prompt"].encode()) - 2]
    assert said[1:] == [
        f"note: --tokenizer {without}: its tokenizer has no chat template; prompts are used as they are"
    ]
    for document, asked, expected in (
        (CUSTOM[0], ExperimentConfig(model=tiny), f"--model {tiny}: the folder holds no tokenizer ("),
        (chat(TURNS[:2]), config, f"--tokenizer {without}: its tokenizer has no chat template, and a chat needs one; "),
    ):
        with pytest.raises(ConfigError) as caught:
            lengths(workload_of(tmp_path, document), asked)
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)
