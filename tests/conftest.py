"""What several test modules need: the repository's folder, and the scripts run as a user runs them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
from _pytest.runner import runtestprotocol

import batch_inference_experiment
from in_process import called

# Images switch bytecode off to stay small: each of the hundreds of processes would then compile our modules again, and
# pytest every test.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# What is printed is as wide as on a terminal of 80 columns, wherever the tests run.
os.environ["COLUMNS"] = "80"
# Every worker imports and collects everything. seaborn does without scipy, of which it would load as much as pandas and
# matplotlib are together; and there is no garbage before the tests.
sys.modules |= {"scipy.stats": None, "scipy.cluster": None}
gc.disable()

# A limit for each test, longer than that of the fast ones in pyproject.toml.
LIMITS_S = {"slow": 300, "vllm": 1200}

REPOSITORY = Path(__file__).resolve().parent.parent
STUB = REPOSITORY / "tests" / "stub"
RESULT_SCHEMA = json.loads((REPOSITORY / "batch_inference" / "core" / "result.schema.json").read_text())
# The user's own caches are neither read nor written.
CACHE = Path(tempfile.mkdtemp(prefix="batch_inference_cache_"))
# A vLLM that is installed is asked only where that is what is tested: it takes longer than all the fast tests.
os.environ["BATCH_INFERENCE_PLAN_LIMIT_S"] = "0"
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def with_weights(name: str) -> str:
    """The folder of a model of this repository, here with weights, which no stand-in reads."""
    folder = CACHE / "models" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        shutil.copy(REPOSITORY / "models" / name / "config.json", folder)
        (folder / "pytorch_model.bin").touch()
    return str(folder)


TINY = with_weights("tiny-llama")
SMALL_GRID = ("--batch-sizes", "1,2", "--seq-lens", "8", "--max-tokens", "4", "--num-runs", "2")


def pytest_collection_finish() -> None:
    """What is loaded now stays: the garbage collector need not look at all of it again and again."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, limit_s in LIMITS_S.items():
            if item.get_closest_marker(name) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(limit_s))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """As pytest does it, but without a report on the setup and the end of a test that passed: with xdist each report
    goes from one process to another, and takes longer than most of the tests."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def special() -> ModuleType:
    """scipy.special, loaded where it is needed: it takes long, and every worker collects every file."""
    return importlib.import_module("scipy.special")


@pytest.fixture
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer dots, where only what is drawn matters."""
    from batch_inference.analyze import plots

    monkeypatch.setattr(plots, "DPI", 40)


@pytest.fixture(scope="session")
def real_model() -> str:
    """The folder of a small model with weights, tokenizer, chat template and end of sequence."""
    done = subprocess.run(
        [REPOSITORY / "tests" / "make_smollm2.sh"], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "it says nothing")
        pytest.skip(f"tests/make_smollm2.sh cannot make the model here: {reason}")
    return done.stdout.strip()


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """batch_inference_experiment.py on the stub vLLM, the tiny model and a small grid; its engines are processes."""

    def run(*flags: str, grid: tuple[str, ...] = SMALL_GRID, **variables: str) -> subprocess.CompletedProcess[str]:
        command = experiment_command(tmp_path, *grid, *flags)
        return called(batch_inference_experiment.main, command[1:], tmp_path, stub_environment(**variables))

    return run


def experiment_command(folder: Path, *flags: str) -> list[str]:
    script = str(REPOSITORY / "batch_inference_experiment.py")
    output = ("--output-file", str(folder / "tp_1_results.json"))
    return [sys.executable, script, "--model", TINY, *output, *flags]


def with_ctrl_c() -> None:
    """preexec_fn of a process that is to be interrupted: one in the background, or under nohup, may have inherited to
    ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stub_environment(**variables: str) -> dict[str, str]:
    """The stub vLLM, as if the machine had no network."""
    ours = {"PYTHONPATH": str(STUB), "XDG_CACHE_HOME": str(CACHE), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, **variables}


def imports_of(command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> list[list[str]]:
    """What each Python imports that a command starts; a program that imports little answers at once, whatever else the
    machine does. Modules with an underscore are the interpreter's, or those of a .pth file."""
    # Without what measures the coverage of subprocesses: it imports itself.
    environment = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPROFILEIMPORTTIME": "1"}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    _, *pythons = done.stderr.split("imported package\n")
    return [re.findall(r"^import time: .*\| +([A-Za-z]\S*)$", lines, re.MULTILINE) for lines in pythons]


def assert_answers_at_once(command: Sequence[str | Path], folder: Path, environment: dict[str, str]) -> None:
    """One Python, nothing but its own library and our modules, and few of them."""
    ((bare,), (imported,)) = (imports_of(words, folder, environment) for words in ((sys.executable, "-c", ""), command))
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    # What Python's own library tries to import and does not find counts for nothing.
    assert set(filter(importlib.util.find_spec, packages)) == {"batch_inference"}
    assert len(imported) < 12 * len(bare)


def assert_as_the_schema_says(path: Path) -> None:
    """A result file."""
    jsonschema.Draft202012Validator(RESULT_SCHEMA).validate(json.loads(path.read_text()))


def is_running(pid: int) -> bool:
    """A zombie, which its parent has not looked at yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def running_in(group: int) -> list[int]:
    """The processes of a group."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if is_running(pid) and _group_of(pid) == group]


def _group_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def loaded_with(log_path: Path) -> dict[str, str]:
    """The variables that the stub vLLM saw when it loaded."""
    line = next(line for line in log_path.read_text().splitlines() if line.startswith("stub vLLM is loading"))
    return dict(word.split("=", 1) for word in shlex.split(line)[4:])


def commands_of(plan: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The commands of a plan of the launcher, which stand among comments."""
    return [shlex.split(line) for line in plan.stdout.splitlines() if not line.startswith("#")]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has, below those that the kernel gives out itself."""
    while True:
        first = random.randrange(16_000, 32_000 - count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as servers:
            for port in range(first, first + count):
                servers.enter_context(socket.create_server(("", port)))
            return first
