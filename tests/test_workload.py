"""The file of a job's requests: which format a line is of, what is taken of it, and what is said of a bad one."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core import workload as workload_module
from batch_inference.core.config import ConfigError
from batch_inference.core.workload import Entry, Workload


def read(folder: Path, text: str, *, skip: bool = False) -> tuple[list[Entry], Workload]:
    path = folder / "jobs"
    path.write_text(text, errors="surrogateescape")
    workload = Workload(path, skip)
    return list(workload.entries()), workload


def said(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    return str(caught.value).replace(f"--prompts-file {folder / 'jobs'}", "FILE")


def chat(**body: Any) -> dict[str, Any]:
    return {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **body}}


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("document", "entry"),
    [
        ({"prompt_tokens": 812, "output_tokens": 96}, Entry(812, output_tokens=96)),
        ({"prompt_tokens": 1}, Entry(1)),
        ({"prompt": "hello", "output_tokens": 5}, Entry(prompt="hello", output_tokens=5, is_question=True)),
        ({"prompt": "hello", "max_tokens": 5}, Entry(prompt="hello", output_tokens=5, is_question=True)),
        ({"prompt_token_ids": [0, 5, 7]}, Entry(prompt_token_ids=[0, 5, 7])),
        ({"prompt_token_ids": [5], "max_completion_tokens": 6}, Entry(prompt_token_ids=[5], output_tokens=6)),
        ({"messages": HELLO, "max_tokens": 7}, Entry(messages=HELLO, output_tokens=7)),
        ({"messages": HELLO, "output_tokens": 9}, Entry(messages=HELLO, output_tokens=9)),
        (
            {"messages": HELLO, "chat_template_kwargs": {"a": 1}, "max_tokens": 7, "output_tokens": 9},
            Entry(messages=HELLO, output_tokens=7, options={"chat_template_kwargs": {"a": 1}}),
        ),
        (chat(messages=HELLO, max_tokens=7), Entry(messages=HELLO, output_tokens=7)),
        (chat(messages=HELLO, max_tokens=7, max_completion_tokens=8), Entry(messages=HELLO, output_tokens=8)),
        (chat(messages=HELLO, n=1, response_format={"type": "text"}), Entry(messages=HELLO)),
        (
            chat(messages=HELLO, add_generation_prompt=False, chat_template_kwargs={"a": 1}, top_p=0.5, documents=None),
            Entry(messages=HELLO, options={"add_generation_prompt": False, "chat_template_kwargs": {"a": 1}}),
        ),
        (
            {"url": "/v1/completions", "body": {"prompt": "a", "add_special_tokens": False, "reasoning_effort": "low"}},
            Entry(prompt="a", options={"add_special_tokens": False}),
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
            Entry(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
        ),
        ({"url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 3}}, Entry(prompt="a", output_tokens=3)),
        ({"url": "/v1/completions", "body": {"prompt": ["hello"]}}, Entry(prompt="hello")),
        ({"url": "/v1/completions", "body": {"prompt": [1, 2]}}, Entry(prompt_token_ids=[1, 2])),
        ({"url": "/v1/completions", "body": {"prompt": [[1, 2]]}}, Entry(prompt_token_ids=[1, 2])),
        (
            {"id": "a", "conversations": [
                {"from": "system", "value": "be good"}, {"from": "human", "value": "why?"},
                {"from": "gpt", "value": "so"},
                {"from": "human", "value": "and then?"},
            ]},
            Entry(prompt="why?", output="so"),
        ),
    ],
)  # fmt: skip
def test_a_request_of_each_format(document: dict[str, Any], entry: Entry, tmp_path: Path) -> None:
    line = json.dumps(document)
    assert read(tmp_path, f"{line}\n\n{line}\n")[0] == [entry] * 2
    # As one array too, pretty or not.
    for indent in (None, 2):
        assert read(tmp_path, f" \n{json.dumps([document] * 3, indent=indent)}\n")[0] == [entry] * 3


def test_a_table_of_lengths(tmp_path: Path) -> None:
    text = "id, prompt_tokens,output_tokens\r\n1,812,96\r\n\r\n2,40.0,\r\n"
    expected = [Entry(812, output_tokens=96), Entry(40)]
    assert read(tmp_path, text)[0] == expected
    assert read(tmp_path, f"\ufeff{text}")[0] == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "FILE: it has no usable request; write one on each line"),
        ("[]", "FILE: it has no usable request; write one on each line"),
        ("prompt_tokens\n", "FILE: it has no usable request; write one on each line"),
        ("words\n1\n", "FILE, line 1: 'words' begins like neither JSON nor a CSV with the columns prompt_tokens"),
        ('{"prompt_tokens": 1}\n\n{"prompt', "FILE, line 3: it is not JSON; fix it, or leave it out with --skip"),
        ('[{"prompt_tokens": 1}, {"prompt', "FILE, entry 2: it is not JSON, and nothing after it can be read; fix it"),
        ('[{"prompt_tokens": 1},\n', "FILE, entry 2: the list has no closing ]; fix it, or write lines of JSON"),
        ('[{"prompt_tokens": 1}]\n[', "FILE: something follows its list of 1 request; give one list"),
        ('{"prompt_tokens": 0}', "FILE, line 1: its prompt_tokens '0' is not a number of tokens from 1 to 134217728; "),
        ('{"prompt_tokens": -3}', "FILE, line 1: its prompt_tokens '-3' is not a number"),
        ('{"prompt_tokens": 1.5}', "FILE, line 1: its prompt_tokens '1.5' is not a number"),
        ('{"prompt_tokens": 1e400}', "FILE, line 1: its prompt_tokens 'inf' is not a number"),
        ('{"prompt_tokens": true}', "FILE, line 1: its prompt_tokens 'True' is not a number"),
        ('{"prompt_tokens": [1]}', "FILE, line 1: its prompt_tokens '[1]' is not a number"),
        ('{"prompt": "a", "output_tokens": "many"}', "FILE, line 1: its output_tokens 'many' is not a number"),
        ('{"prompt": ""}', "FILE, line 1: its prompt is not a text; fix it"),
        ('{"prompt_token_ids": [1, -1]}', "FILE, line 1: its token ids are not a list of numbers"),
        ('{"prompt_token_ids": [1, 9999999999]}', "FILE, line 1: its token ids are not a list of numbers"),
        ("{}", "FILE, line 1: it has none of body, conversations, messages, prompt, prompt_token_ids and prompt_tok"),
        ("[3]", "FILE, entry 1: it is not a JSON object; fix"),
        ('{"body": 3}', "FILE, line 1: its body is not an object; fix"),
        ('{"url": "/v1/x", "body": {}}', "FILE, line 1: its url '/v1/x' is neither /v1/chat/completions nor"),
        ('{"messages": "hello"}', "FILE, line 1: its messages are not a list of objects"),
        (json.dumps(chat()), "FILE, line 1: its messages are not a list of objects"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "FILE, line 1: its conversation has no question with"),
        ("prompt_tokens,output_tokens\n5,5\n6,x\n", "FILE, line 3: its output_tokens 'x' is not a number of tokens"),
        ("prompt_tokens,output_tokens\n5,5\n1,200,96\n", "FILE, line 3: it has 3 cells for 2 columns; fix it"),
        ('prompt_tokens,output_tokens\n5,5\n"6,5\n6,5\n', "FILE, line 3: its prompt_tokens '6,5\\n6,5\\n' is no"),
        ("x" * 200_000, f"FILE, line 1: '{'x' * 40}…{'x' * 39}' begins like neither JSON nor a CSV"),
        ("\x1f\udc9b[31m", r"FILE, line 1: '\x1f\udc9b[31m' begins like neither JSON nor a CSV"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(text: str, words: str, tmp_path: Path) -> None:
    assert said(tmp_path, text).startswith(words)


REFUSED = [
    chat(messages=HELLO, n=2),
    chat(messages=HELLO, response_format={"type": "json_object"}),
    chat(messages=HELLO, guided_json={"type": "object"}),
    chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    {"url": "/v1/embeddings", "body": {"input": "a"}},
    {"url": "/v1/completions", "body": {"prompt": ["a", "b"]}},
    chat(messages=HELLO, chat_template="{{ messages }}"),
    chat(messages=HELLO, chat_template_kwargs={"chat_template": "a"}),
    chat(messages=HELLO, truncate_prompt_tokens=5),
    {"url": "/v1/completions", "body": {"prompt": "a", "suffix": "b"}},
    {"messages": HELLO, "n": 2},
]


def test_what_is_not_measured_is_counted_and_refused_at_the_end(tmp_path: Path) -> None:
    lines = [{"prompt_tokens": 1}, *REFUSED, REFUSED[0]]
    text = "\n".join(map(json.dumps, lines))
    assert said(tmp_path, text) == (
        "FILE: not measured: 3 with n over 1 (first: line 2), 2 with structured output (first: line 3), 1 with images "
        "or other media (first: line 5), 1 for embeddings (first: line 6), 1 with several prompts (first: line 7), 2 "
        "with a chat template of their own (first: line 8), 2 with a suffix or a truncated prompt (first: line 10); "
        "leave them out with --skip-bad-lines"
    )


def test_what_is_bad_or_refused_can_be_left_out_and_is_told(tmp_path: Path) -> None:
    lines = ['{"prompt_tokens": 1}', "{", "{}", json.dumps(REFUSED[0]), '{"prompt_tokens": 2}']
    entries, workload = read(tmp_path, "\n".join(lines), skip=True)
    assert entries == [Entry(1), Entry(2)]
    told = f"--prompts-file {workload.path}: left out: 1 with n over 1, 2 bad lines"
    assert workload.told() == told
    list(workload.entries())
    assert workload.told() == told  # of one reading
    with pytest.raises(ConfigError, match="it has no usable request"):
        read(tmp_path, "{}", skip=True)
    assert read(tmp_path, '{"prompt_tokens": 2}')[1].told() is None


def test_rows_that_are_empty_are_none_and_names_may_have_spaces_around(tmp_path: Path) -> None:
    text = 'prompt_tokens , "output_tokens" ,text\n\n,,\n 8 , 4 ,"a\n""b"""\n  \n9,5\n'
    assert read(tmp_path, text)[0] == [Entry(8, output_tokens=4), Entry(9, output_tokens=5)]


@pytest.mark.parametrize(
    ("text", "entries", "bad_lines"),
    [
        (
            "prompt_tokens,text\n1,a\n2,aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n3,b\n4,c,d\n5,e\n",
            [1, 3, 5],
            2,
        ),
        ('{"prompt_tokens": 1}\n{"prompt_tokens": 2, "text": "aaaaaaaaaaaaa"}\n{"prompt_tokens": 3}\n', [1, 3], 1),
    ],
)
def test_a_line_that_is_too_long_costs_itself_alone(
    text: str, entries: list[int], bad_lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_module, "_LONGEST_ENTRY", 40)
    found, workload = read(tmp_path, text, skip=True)
    assert ([entry.prompt_tokens for entry in found], workload.bad_lines) == (entries, bad_lines)


@pytest.mark.parametrize("text", ['[{"prompt_tokens": 1}, {bad}, {"prompt_tokens": 3}]', '[{"prompt_tokens": 1}'])
def test_of_a_broken_list_nothing_is_left_out(text: str, tmp_path: Path) -> None:
    """Where the next entry begins, nobody knows: all that follow would be lost."""
    with pytest.raises(ConfigError, match=r", entry 2: .*; fix it, or write lines of JSON$"):
        read(tmp_path, text, skip=True)


@pytest.mark.parametrize("name", ["absent", "folder"])
def test_what_is_no_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"^--prompts-file {tmp_path / name}: it cannot be read .*; give a file$"):
        list(Workload(tmp_path / name).entries())


@pytest.mark.parametrize("form", ["lines", "array", "table"])
def test_however_many_there_are_little_is_held(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload_module, "_CHUNK", 1000)
    count = 5_000
    with (tmp_path / "jobs").open("w") as file:
        file.write({"lines": "", "array": "[", "table": "prompt_tokens,output_tokens\n"}[form])
        line = "812,96\n" if form == "table" else '{"prompt_tokens": 812, "output_tokens": 96}'
        separator = {"lines": "\n", "array": ",\n", "table": ""}[form]
        file.write(separator.join([line] * count) + ("]" if form == "array" else ""))
    tracemalloc.start()
    try:
        assert sum(1 for _ in Workload(tmp_path / "jobs").entries()) == count
        assert (
            tracemalloc.get_traced_memory()[1] < 100_000
        )  # bytes; all entries are six times as many, the file up to twice
    finally:
        tracemalloc.stop()
