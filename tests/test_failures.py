"""Classes of failures, by the words of vLLM 0.26.0 and 0.32.0, torch and the model hub."""

from __future__ import annotations

import pytest

from batch_inference.core.failures import ADVICE, FAILURES, SAME_FOR_ALL, classify, markdown_table

SAID = [
    ("load", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "oom_load"),
    ("run", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "oom_run"),
    ("load", "ValueError: Free memory on device cuda:0 (10.1/79.2 GiB) on startup is less than desired", "oom_load"),
    ("run", "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to", "oom_run"),
    ("load", "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_util", "kv_too_small"),
    ("load", "ValueError: To serve at least one request with the model's max seq len (4096), (8.0 GiB KV cache is "
     "needed, which is larger than the available KV cache memory (0.1 GiB).", "kv_too_small"),
    ("load", "ValueError: User-specified max_model_len (9) is greater than the derived max_model_len", "max_model_len"),
    ("load", "ValueError: Total number of attention heads (32) must be divisible by tensor parallel size (3).",
     "tp_not_dividing"),
    ("load", "AssertionError: 32000 is not divisible by 3", "tp_not_dividing"),
    ("load", "ValueError: World size (8) is larger than the number of available GPUs (2)", "too_few_devices"),
    ("load", "OSError: no/such is not a local folder and is not a valid model identifier listed on", "model_not_found"),
    ("load", "OSError: You are trying to access a gated repo.", "model_gated"),
    ("load", "huggingface_hub.errors.GatedRepoError: 403 Client Error.", "model_gated"),
    ("load", "OSError: We couldn't connect to 'https://huggingface.co' to load the files", "network_offline"),
    ("load", "LocalEntryNotFoundError: Cannot find the requested files in the disk cache", "network_offline"),
    ("run", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", "engine_crash"),
    ("run", "the engine process ended with signal SIGABRT", "engine_crash"),
    ("run", "the engine process ended with signal SIGKILL", "worker_killed"),
    ("run", "Worker proc VllmWorker-1 died unexpectedly (exit code: -9); -9 usually means", "worker_killed"),
    ("run", "Worker proc VllmWorker-1 died unexpectedly (exit code: 1)", "engine_crash"),
    ("load", "torch.distributed.DistNetworkError: EADDRINUSE, Address already in use", "port_in_use"),
    ("load", "KeyError: 'something'", "unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "said", "expected"), SAID)
def test_a_failure_is_known_by_what_is_said(phase: object, said: str, expected: str) -> None:
    assert classify(phase, said) == expected  # type: ignore[arg-type]


def test_every_class_that_is_known_by_words_has_an_example() -> None:
    assert {name for *_, name in SAID} | {"timeout_startup", "timeout_point"} == {kind.name for kind in FAILURES}
    assert all(advice and "\n" not in advice for advice in ADVICE.values())


def test_what_the_reason_does_not_say_the_errors_of_the_log_do_the_last_first() -> None:
    log = [
        "WARNING [utils.py:1] Port 29500: Address already in use, trying another",
        "(Worker) ERROR ValueError: No available memory for the cache blocks.",
        "INFO done",
    ]
    assert classify("load", "RuntimeError: Engine core initialization failed", log) == "kv_too_small"
    # A warning is of what was survived.
    assert classify("load", "RuntimeError: Engine core initialization failed", log[:1]) == "unknown"


OOM, PORT = (
    "(Worker) ERROR torch.OutOfMemoryError: CUDA out of memory",
    "(EngineCore) ERROR OSError: Address already in use",
)


@pytest.mark.parametrize(("log", "kind"), [([OOM, PORT], "port_in_use"), ([PORT, OOM], "oom_load")])
def test_of_the_errors_in_a_log_the_last_that_is_known_counts(log: list[str], kind: str) -> None:
    handed_on = "RuntimeError: Engine core initialization failed"
    assert classify("load", handed_on, [*log, "(Worker) ERROR something else", "INFO done"]) == kind
    # What the reason itself says stands before all of the log.
    assert classify("load", "ValueError: No available memory for the cache blocks.", log) == "kv_too_small"


@pytest.mark.parametrize(
    ("phase", "said", "expected"),
    [
        # Of a cause and its consequence in one line the cause counts.
        ("load", "LocalEntryNotFoundError after GatedRepoError: 401 Client Error", "model_gated"),
        ("load", "RepositoryNotFoundError: 404 Client Error after Max retries exceeded", "network_offline"),
        ("run", "CUDA out of memory; then EngineDeadError", "oom_run"),
        ("run", "Address already in use; the engine process ended", "port_in_use"),
        ("run", "Worker died unexpectedly (exit code: -9)", "worker_killed"),
        # Only a start looks for free memory.
        ("run", "ValueError: Free memory on device cuda:0", "unknown"),
    ],
)
def test_the_cause_stands_before_what_follows_from_it(phase: object, said: str, expected: str) -> None:
    assert classify(phase, said) == expected  # type: ignore[arg-type]


# Every phrase by which a class is known, alone.
PHRASES = {
    "model_gated": "GatedRepoError|gated repo|401 Client Error|403 Client Error|is restricted",
    "network_offline": "OfflineModeIsEnabled|LocalEntryNotFoundError|couldn't connect to|Max retries|name resolution"
    "|Name or service not known|Network is unreachable|outgoing traffic has been disabled",
    "model_not_found": "RepositoryNotFoundError|not a valid model identifier|404 Client Error"
    "|Invalid repository ID or local directory|Repo id must|does not appear to have a file named config.json",
    "tp_not_dividing": "must be divisible by tensor parallel size|is not divisible by 3|not divisible by tensor",
    "too_few_devices": "larger than the number of available GPUs|exceeds the total number of available"
    "|invalid device ordinal|No CUDA GPUs are available",
    "max_model_len": "greater than the derived max_model_len|longer than the maximum model length"
    "|exceeds max_model_len|exceed the max_model_len|exceeds the max_model_len",
    "kv_too_small": "No available memory for the cache blocks|larger than the available KV cache",
    "oom_load": "out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|Free memory on device",
    "oom_run": "out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory",
    "port_in_use": "Address already in use|EADDRINUSE",
    "worker_killed": "exit code: -9|signal SIGKILL",
    "engine_crash": "EngineDeadError|died unexpectedly|ended without a word|the engine process ended|node 12 is gone"
    "|Segmentation fault",
    "unknown": "exit code: -90|is not divisible by x|anything else",
}


@pytest.mark.parametrize("kind", PHRASES)
def test_each_phrase_alone_is_enough(kind: str) -> None:
    phases = {"oom_load": ["load"], "oom_run": ["run"]}.get(kind, ["load", "run"])
    for phrase in PHRASES[kind].split("|"):
        for phase in phases:
            assert classify(phase, f"it was: {phrase}") == kind, phrase  # type: ignore[arg-type]
            log = [f"Error: {phrase}", "INFO Address already in use"]
            assert classify(phase, "", log) == kind, phrase  # type: ignore[arg-type]


def test_lines_of_a_log_count_that_are_errors() -> None:
    for line, counts in (
        ("ERROR x EADDRINUSE", True), ("OSError: EADDRINUSE", True), ("Exception: EADDRINUSE", True),
        ("Errors: EADDRINUSE", False), ("INFO EADDRINUSE", False), ("WARNING EADDRINUSE", False),
    ):  # fmt: skip
        assert classify("run", "x", [line]) == ("port_in_use" if counts else "unknown")
    assert classify("run", "x") == "unknown"


def test_what_is_advised_is_this() -> None:
    assert ADVICE == {
        "timeout_startup": "raise --startup-timeout, or see in the log where the start hangs",
        "timeout_point": "raise --point-timeout, or see in the log where the run hangs",
        "model_gated": "ask for access on the model's page, and set HF_TOKEN",
        "network_offline": "give a model folder as --model, or connect to the hub",
        "model_not_found": "check --model: a folder with a config.json, or org/name of the hub",
        "tp_not_dividing": "choose a --tensor-parallel-size that divides the model's heads and sizes",
        "too_few_devices": "lower TP x PP x DP, or free devices; CUDA_VISIBLE_DEVICES may hide some",
        "max_model_len": "shorten --seq-lens or --max-tokens, or lower --max-model-len",
        "kv_too_small": "shorten --seq-lens, raise --gpu-memory-utilization or TP",
        "oom_load": "raise TP or PP, or free the device: another process may hold it",
        "oom_run": "use smaller --batch-sizes or --seq-lens, or a lower --gpu-memory-utilization",
        "port_in_use": "another engine uses the port: set VLLM_PORT or --master-port",
        "worker_killed": "usually the machine ran out of main memory: see dmesg, and free some",
        "engine_crash": "see the end of the log",
        "unknown": "see the end of the log",
    }
    assert {"model_gated", "network_offline", "model_not_found"} == SAME_FOR_ALL
    rows = markdown_table().splitlines()
    assert (rows[:2], len(rows)) == (["| class | what to do |", "|---|---|"], 2 + len(ADVICE))
    assert rows[-1] == "| `unknown` | see the end of the log |"
