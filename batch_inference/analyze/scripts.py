"""The scripts that use a setting: run.py on one machine, ray_data.py on many nodes. Each is one file, to be read, kept
and changed; they import vLLM or Ray, and nothing of this program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batch_inference.analyze.engine_setting import EngineSetting
from batch_inference.analyze.yaml_text import comments

# Batches of Ray Data that an engine works on at once, and so many parts of what it may run at once is each of them:
# twice as many requests are at hand as run.
_BATCHES, _PARTS = 8, 4


def run_script(head: Sequence[str], setting: EngineSetting) -> str:
    """Every replica a process with devices of its own, and every n-th request."""
    devices = _CORES if setting.on_cpu else _GPUS
    coupled = _COUPLED if setting.is_coupled else _INDEPENDENT
    constants = {
        "ENGINE": setting.values,
        "SAMPLING": setting.sampling,
        "REPLICAS": setting.replicas,
        "DEVICES_PER_REPLICA": setting.devices_per_replica,
        "COUPLED": setting.is_coupled,
    }
    return "\n".join([*_head(head), _RUN_IMPORTS, *_constants(constants), _RUN, devices, coupled, _RUN_END])


def ray_script(head: Sequence[str], setting: EngineSetting, replicas: int) -> str:
    engine = {name: value for name, value in setting.values.items() if name != "model"}
    if setting.nnodes > 1:
        # Ray places the workers of a replica, and `mp` would look for all of them on one node.
        engine["distributed_executor_backend"] = "ray"
    constants = {
        "MODEL": setting.values["model"],
        "ENGINE": engine,
        "SAMPLING": setting.sampling,
        "REPLICAS": replicas,
        "BATCH": max(1, math.ceil(setting.values["max_num_seqs"] / _PARTS)),
        "BATCHES_AT_ONCE": _BATCHES,
        # Else Ray waits for a GPU for each worker.
        "PLACEMENT": {"bundle_per_worker": {"CPU": 1}} if setting.on_cpu else None,
    }
    return "\n".join([*_head(head), _RAY_IMPORTS, *_constants(constants), _RAY])


def _head(lines: Sequence[str]) -> list[str]:
    return ["#!/usr/bin/env python3", *(line for text in lines for line in comments(text))]


def _constants(values: Mapping[str, Any]) -> list[str]:
    """A line for each, and for each entry of a dict. What comes from a file is written as Python's own repr."""
    return [
        f"{name} = {_entries(value) if isinstance(value, dict) else _repr(value)}" for name, value in values.items()
    ]


def _entries(value: Mapping[str, Any]) -> str:
    return "\n".join(["{", *(f"    {_repr(name)}: {_repr(one)}," for name, one in value.items()), "}"])


def _repr(value: Any) -> str:
    """In double quotes, where a text has none inside."""
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and not {'"', "\\", "'"} & set(text[1:-1]) else text


# --- run.py -------------------------------------------------------------------------------------------------------

_RUN_IMPORTS = """
import heapq
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# What each replica's LLM gets; vllm_config.yaml says the same."""

_RUN = '''
# So many requests of each replica are submitted together; their answers are on disk before the next ones begin.
TOGETHER = 64 * ENGINE["max_num_seqs"]
WHICH_REPLICA = "RUN_PY_REPLICA"  # tells a process of this script its number


def main():
    if len(sys.argv) != 3:
        refuse(f"usage: python {sys.argv[0]} REQUESTS.jsonl ANSWERS.jsonl")
    requests, answers = sys.argv[1:]
    asked = read(requests)
    if WHICH_REPLICA in os.environ:
        answer(asked, answers, int(os.environ[WHICH_REPLICA]))
        return
    if not asked:
        refuse(f"{requests}: holds no requests")
    check_place(answers, requests)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the replicas too
    seconds = run_replicas(requests, answers)
    if say_what_was_done(answers, len(asked), seconds):
        sys.exit(1)


def read(path):
    """(prompt or messages, most output tokens, custom_id) of each line: one with "prompt", "prompt_token_ids" or
    "messages", or one of an OpenAI batch file."""
    try:
        with open(path, encoding="utf-8") as file:
            return [request(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        refuse(f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        refuse(f"{path}: is no text in UTF-8")


def request(line, place):
    try:
        row = json.loads(line)
        body = row.get("body", row)
        asked = body.get("messages") or prompt_of(body)
    except (ValueError, AttributeError):
        asked = None
    if not asked:
        refuse(f"{place}: is no request with prompt, prompt_token_ids or messages")
    limits = (body.get(key) for key in ("max_completion_tokens", "max_tokens", "output_tokens"))
    most = next((limit for limit in limits if limit is not None), SAMPLING["max_tokens"])
    return asked, most, row.get("custom_id")


def check_place(answers, requests):
    """Before an engine is loaded, which takes long."""
    if not os.path.isdir(os.path.dirname(answers) or "."):
        refuse(f"{answers}: its folder does not exist; create it first")
    if os.path.isdir(answers):
        refuse(f"{answers}: is a folder; give a file for the answers")
    if os.path.exists(answers) and os.path.samefile(answers, requests):
        refuse(f"{answers}: holds the requests; give another file for the answers")


def refuse(why):
    print(why, file=sys.stderr)
    sys.exit(2)


def prompt_of(body):
    """As LLM.enqueue takes it: a text, or token ids. None where there is neither."""
    prompt = body.get("prompt_token_ids") or body.get("prompt")
    return prompt and {"prompt_token_ids" if isinstance(prompt, list) else "prompt": prompt}


def answer(requests, path, replica=0):
    """Of every REPLICAS-th request, a line each, in the order of the file."""
    from vllm import LLM

    llm = LLM(**ENGINE)
    begin = time.perf_counter()
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, len(requests), TOGETHER * REPLICAS):
            mine = list(enumerate(requests[start : start + TOGETHER * REPLICAS], start))[replica::REPLICAS]
            errors = [submit(llm, asked, most) for _, (asked, most, _) in mine]
            # Coupled replicas take every step together: one without a request of its own has to have one.
            if COUPLED and None not in errors:
                submit(llm, {"prompt_token_ids": [0]}, 1)
            outputs = iter(llm.wait_for_completion())
            for (index, (_, _, custom_id)), error in zip(mine, errors):
                row = {"index": index, "custom_id": custom_id}
                if error is None:
                    best = next(outputs).outputs[0]
                    row |= {"text": best.text, "output_tokens": len(best.token_ids)}
                    row["finish_reason"] = best.finish_reason  # "stop": by itself, "length": cut off
                else:
                    row["error"] = error
                file.write(json.dumps(row, ensure_ascii=False) + "\\n")
            file.flush()
    Path(f"{path}.seconds").write_text(str(time.perf_counter() - begin))
    if COUPLED:
        time.sleep(1)  # the others may still wait for this one's last step


def submit(llm, asked, most):
    """Why vLLM refuses this request, as one that is longer than max_model_len; None where it takes it."""
    from vllm import SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    enqueue = llm.enqueue_chat if isinstance(asked, list) else llm.enqueue
    try:
        enqueue([asked], SamplingParams(**{**SAMPLING, "max_tokens": most}), use_tqdm=False)
    except EngineDeadError:
        raise
    except Exception as error:  # of vLLM, of the chat template, of the tokenizer
        return str(error) or type(error).__name__


def run_replicas(requests, answers):
    """Each a process with devices of its own, because vLLM takes what it sees when it is imported, and a single one
    too, so that what vLLM says at its end comes before our last line. Returns the seconds of the slowest one, without
    the start of its engine."""
    parts = [f"{answers}.part_{replica}" for replica in range(REPLICAS)] if REPLICAS > 1 else [answers]
    times = [Path(f"{part}.seconds") for part in parts]
    began = time.time()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, requests, part],
            env={**os.environ, **variables_of(replica), WHICH_REPLICA: str(replica)},
        )
        for replica, part in enumerate(parts)
    ]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            if COUPLED and any(process.poll() for process in processes):
                break
    finally:
        for process in processes:
            process.terminate()
        failed = sum(process.wait() != 0 for process in processes)
        seconds = [float(file.read_text()) for file in times if file.exists()]
        for file in times:
            file.unlink(missing_ok=True)
        if failed:
            say_what_is_kept(failed, parts, began)
    if failed:
        sys.exit(1)
    if REPLICAS > 1:
        merge(parts, answers)
    return max(seconds)


def merge(parts, answers):
    """In the order of the requests."""
    files = [open(part, encoding="utf-8") for part in parts]
    with open(answers, "w", encoding="utf-8") as file:
        file.writelines(heapq.merge(*files, key=lambda line: json.loads(line)["index"]))
    for part, opened in zip(parts, files):
        opened.close()
        Path(part).unlink()


def say_what_is_kept(failed, files, began):
    """Of this run: files of an earlier one may lie there still."""
    own = [name for name in files if os.path.exists(name) and os.path.getmtime(name) >= began]
    kept = [name for name in own if os.path.getsize(name)]
    who = f"{failed} of {REPLICAS} replicas failed or were" if REPLICAS > 1 else "the engine failed or was"
    print(f"{who} stopped; answered so far: {', '.join(kept) or 'nothing'}", file=sys.stderr)


def say_what_was_done(answers, asked, seconds):
    """The last line. Returns how many requests failed."""
    tokens = failed = stopped = 0
    with open(answers, encoding="utf-8") as file:
        for row in map(json.loads, file):
            tokens += row.get("output_tokens", 0)
            failed += "error" in row
            stopped += row.get("finish_reason") == "stop"
    print(
        f"{answers}: {asked - failed:,} of {asked:,} requests answered, {tokens:,} output tokens in {seconds:,.1f} s "
        f"({tokens / seconds:,.0f} tok/s), {stopped:,} ended by "
        + ("itself" if stopped == 1 else "themselves")
        + (f', {failed:,} failed: see "error"' if failed else ""),
        file=sys.stderr,
    )
    return failed
'''

_GPUS = '''
def devices_of(replica):
    """The slice of the GPUs: of CUDA_VISIBLE_DEVICES where it is set, else of the first ones."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = seen.split(",") if seen else [str(number) for number in range(REPLICAS * DEVICES_PER_REPLICA)]
    if len(devices) < REPLICAS * DEVICES_PER_REPLICA:
        sys.exit(f"CUDA_VISIBLE_DEVICES={seen}: {REPLICAS * DEVICES_PER_REPLICA} GPUs are needed")
    first = replica * DEVICES_PER_REPLICA
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + DEVICES_PER_REPLICA])}
'''

_CORES = '''
def devices_of(replica):
    """The slice of the cores, in equal parts for the workers of the replica."""
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ and REPLICAS == 1:
        return {}
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // (REPLICAS * DEVICES_PER_REPLICA)
    if not size:
        sys.exit(f"there are {len(cores)} cores: {REPLICAS * DEVICES_PER_REPLICA} are needed")
    first = replica * DEVICES_PER_REPLICA
    slices = [cores[number * size : (number + 1) * size] for number in range(first, first + DEVICES_PER_REPLICA)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in slices)}
'''

_INDEPENDENT = """
def variables_of(replica):
    # Replicas that start together must not look for a free port in the same place.
    ports = {"VLLM_PORT": str(20000 + 100 * replica)} if REPLICAS > 1 else {}
    return {**devices_of(replica), **ports}

"""

_COUPLED = '''
def variables_of(replica):
    """What makes vLLM share out the experts among the replicas."""
    coupling = {
        "VLLM_DP_SIZE": REPLICAS,
        "VLLM_DP_RANK": replica,
        "VLLM_DP_RANK_LOCAL": 0,
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": 19990,
        "VLLM_PORT": 20000 + 100 * replica,
    }
    return {**devices_of(replica), **{name: str(value) for name, value in coupling.items()}}
'''

_RUN_END = """\
if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
"""

# --- ray_data.py --------------------------------------------------------------------------------------------------

_RAY_IMPORTS = """
import sys

import ray
from ray.data import llm

# What each replica's engine gets, beside the model."""

_RAY = '''

def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} REQUESTS.jsonl ANSWERS_FOLDER")
    rows = ray.data.read_json(sys.argv[1])
    # More parts than replicas, so that all have work until the end.
    rows = rows.repartition(4 * REPLICAS)
    columns = rows.schema().names
    is_chat = "messages" in columns or "body" in columns
    make_processor(is_chat)(rows).map(readable).write_json(sys.argv[2])


def make_processor(is_chat):
    """Of rows with "messages", with "prompt", or of an OpenAI batch file."""
    # vLLM turns texts into ids and back. Stages of Ray for that would take two more cores for each replica, and Ray
    # waits for ever if there are not enough. The names are those of the version of Ray.
    is_new = "chat_template_stage" in fields()
    more = {
        "chat_template_stage" if is_new else "apply_chat_template": is_chat,
        "tokenize_stage" if is_new else "tokenize": False,
        "detokenize_stage" if is_new else "detokenize": False,
    }
    if "should_continue_on_error" in fields():  # else one request that is refused ends the job
        more["should_continue_on_error"] = True
    if "log_engine_metrics" in fields():  # vLLM imports Ray Serve for them
        more["log_engine_metrics"] = False
    if PLACEMENT:
        more["placement_group_config"] = PLACEMENT
    config = llm.vLLMEngineProcessorConfig(
        model_source=MODEL,
        engine_kwargs=dict(ENGINE),
        concurrency=(REPLICAS, REPLICAS),
        batch_size=BATCH,
        max_concurrent_batches=BATCHES_AT_ONCE,
        **more,
    )
    build = getattr(llm, "build_processor", None) or llm.build_llm_processor
    return build(config, preprocess=asked, postprocess=answered)


def fields():
    return llm.vLLMEngineProcessorConfig.model_fields


def asked(row):
    body = row.get("body") or row
    limits = (body.get(key) for key in ("max_completion_tokens", "max_tokens", "output_tokens"))
    most = next((limit for limit in limits if limit is not None), SAMPLING["max_tokens"])
    what = "messages" if body.get("messages") is not None else "prompt"
    # What is in a row goes along to `answered`.
    sampling = {**SAMPLING, "max_tokens": int(most)}
    return {"custom_id": row.get("custom_id"), what: body[what], "sampling_params": sampling}


def answered(row):
    return {"custom_id": row.get("custom_id"), "text": row["generated_text"]}


def readable(row):
    """What was refused comes past `answered`, with the reason and all that is known of it."""
    error = row.get("__inference_error__") or None
    return {"custom_id": row.get("custom_id"), "text": None if error else row["text"], "error": error}


if __name__ == "__main__":
    main()
'''
