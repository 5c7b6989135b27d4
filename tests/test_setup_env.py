"""setup_env.sh with a fake Python and a fake uv that write down how they were called, and tests/run.sh likewise."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import REPOSITORY

# Makes a "virtual environment" whose python and uv are this very script.
FAKE = """\
#!/usr/bin/env bash
echo "$(basename "$0") $* find_links=${UV_FIND_LINKS:-} default=${UV_DEFAULT_INDEX:-} index=${UV_INDEX:-}" >>"$CALLS"
case $* in
  "-c import sys"*) exit "${TOO_OLD:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/uv" ;;
  "-m pip --version") exit "${NO_PIP:-0}" ;;
  "-c "*socket*) [[ $* == *reachable.example* ]] ;;
  "pip install"*) echo "uv's own words" && exit "${UV_FAILS:-0}" ;;
esac
"""

pytestmark = pytest.mark.slow


class Setup:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "repository with a space"
        self.folder.mkdir()
        for file in [REPOSITORY / "setup_env.sh", *REPOSITORY.glob("requirements*.txt")]:
            shutil.copy(file, self.folder)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self._script(self.bin / "python3", FAKE)
        self._script(self.bin / "nvidia-smi", "#!/bin/sh\nexit ${NO_GPU:-1}\n")

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, *words: str, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "PYTHON"))}
        environment = {**kept, "PATH": f"{self.bin}:{kept['PATH']}", "CALLS": str(self.calls_file), **variables}
        line = f'set -o pipefail; "$@" {redirection}'
        command = ["bash", "-c", line, "-", str(self.folder / "setup_env.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)

    def installs(self) -> list[str]:
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in calls if call.startswith("uv pip install")]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_without_a_gpu_the_cpu_requirements_are_installed_without_torchvision(setup: Setup) -> None:
    done = setup()
    assert done.returncode == 0, done.stderr
    (install,) = setup.installs()
    assert "requirements-cpu.txt" in install
    assert "--override" in install
    overrides = (setup.folder / "requirements-cpu-overrides.txt").read_text()
    assert all(name in overrides for name in ("torchvision", "torchaudio", "torchcodec"))
    assert "--torch-backend cpu" in install
    # Every process of an engine imports some thousand modules.
    assert "--compile-bytecode" in install


def test_with_a_gpu_the_gpu_requirements_are_installed(setup: Setup) -> None:
    assert setup(NO_GPU="0").returncode == 0
    (install,) = setup.installs()
    assert "/requirements.txt" in install
    assert "--override" not in install


def test_a_second_call_installs_nothing(setup: Setup) -> None:
    setup("--dev")
    assert "requirements-dev.txt" in setup.installs()[0]
    for words in ((), ("--dev",)):
        assert setup(*words).returncode == 0
    assert len(setup.installs()) == 1


def test_the_tools_of_the_tests_are_added_when_they_are_asked_for(setup: Setup) -> None:
    setup()
    setup("--dev")
    assert len(setup.installs()) == 2


def test_changed_requirements_are_installed_again(setup: Setup) -> None:
    setup(NO_GPU="0")
    with (setup.folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    setup(NO_GPU="0")
    assert len(setup.installs()) == 2


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_changed_overrides_are_installed_again(setup: Setup) -> None:
    setup()
    with (setup.folder / "requirements-cpu-overrides.txt").open("a") as file:
        file.write("another\n")
    setup()
    assert len(setup.installs()) == 2


def test_a_failed_update_leaves_no_stamp(setup: Setup) -> None:
    setup(NO_GPU="0")
    with (setup.folder / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert setup(NO_GPU="0", UV_FAILS="1").returncode == 1
    assert list((setup.folder / ".venv").glob(".installed-*")) == []


def test_tools_that_cannot_be_added_leave_the_installation_good(setup: Setup) -> None:
    setup()
    assert setup("--dev", UV_FAILS="1").returncode == 1
    assert setup().returncode == 0
    assert len(setup.installs()) == 2


def test_an_environment_without_pip_is_made_again(setup: Setup) -> None:
    assert setup(UV_FAILS="1").returncode == 1
    assert setup(NO_PIP="1").returncode == 0
    assert setup.calls_file.read_text().count(" -m venv ") == 2


def test_a_failed_installation_is_explained_and_tried_again(setup: Setup) -> None:
    failed = setup(UV_FAILS="1")
    assert failed.returncode == 1
    assert "uv's own words" in failed.stderr
    assert "set WHEELS" in failed.stderr.splitlines()[-1]
    assert setup().returncode == 0
    assert len(setup.installs()) == 2


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize("variable", ["WHEELS", "PIP_FIND_LINKS"])
def test_a_folder_with_a_cpu_torch_replaces_pytorchs_own_index(setup: Setup, tmp_path: Path, variable: str) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    setup(**{variable: str(wheels)})
    for install in setup.installs():
        assert "--torch-backend" not in install
        assert f"find_links={wheels}" in install


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_wheel_folder_may_have_a_space_and_an_encoded_name(setup: Setup, tmp_path: Path) -> None:
    wheels = tmp_path / "my wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl").touch()
    setup(WHEELS=str(wheels))
    for install in setup.installs():
        assert "--torch-backend" not in install
        assert f"find_links={wheels} default=" in install


def test_a_wheel_folder_that_does_not_exist_is_refused(setup: Setup) -> None:
    done = setup(WHEELS="/no/such folder")
    assert done.returncode == 2
    assert done.stderr.startswith("error: WHEELS: '/no/such folder' is not a folder")


def test_pips_indexes_reach_uv_where_uv_can_use_them(setup: Setup, tmp_path: Path) -> None:
    extras = f"file://{tmp_path} https://gone.example/simple https://reachable.example/simple"
    links = f"{tmp_path} /no/such/folder"
    setup(PIP_INDEX_URL="https://mirror.example/simple", PIP_EXTRA_INDEX_URL=extras, PIP_FIND_LINKS=links)
    (install,) = setup.installs()
    assert install.rstrip().endswith(
        f"find_links={tmp_path} default=https://mirror.example/simple index=https://reachable.example/simple"
    )


def test_what_the_user_tells_uv_wins_over_pips_settings(setup: Setup) -> None:
    setup(PIP_INDEX_URL="https://mirror.example/simple", UV_DEFAULT_INDEX="https://own.example/simple")
    assert "default=https://own.example/simple" in setup.installs()[0]


def test_wheels_alone_are_tried_first(setup: Setup, tmp_path: Path) -> None:
    setup(WHEELS=str(tmp_path))
    assert ["--no-index" in install for install in setup.installs()] == [True]


def test_an_old_python_is_refused(setup: Setup) -> None:
    done = setup(TOO_OLD="1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: python3 is not Python 3.11 or newer; set PYTHON=/path/to/python3.11"]


def test_an_unknown_word_is_refused(setup: Setup) -> None:
    assert setup("--devel").returncode == 2


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&1 | true", "<&- >&- 2>&-"])
def test_it_installs_where_nobody_reads_what_it_says(setup: Setup, redirection: str) -> None:
    assert setup(redirection=redirection).returncode == 0
    assert setup.installs()
    assert setup("--devel", redirection=redirection).returncode == 2


@pytest.mark.parametrize(
    ("words", "exits", "code", "parts"),
    # The exit codes of the three parts, and of the coverage, which is looked at where all tests run.
    [
        ((), (0, 0, 0, 0), 0, 3),
        (("--fast",), (0, 0, 0, 2), 0, 1),
        ((), (1, 0, 0, 0), 1, 1),
        ((), (0, 1, 0, 0), 1, 2),
        ((), (0, 0, 1, 0), 1, 3),
        ((), (5, 0, 0, 0), 5, 1),
        ((), (0, 0, 0, 2), 2, 1),
        (("-k", "only_slow"), (5, 0, 5, 2), 0, 3),
        (("-k", "only_vllm"), (5, 5, 0, 2), 0, 3),
        (("-k", "nothing"), (5, 5, 5, 2), 5, 3),
    ],
)
def test_all_tests_pass_only_if_all_parts_do(
    tmp_path: Path, words: tuple[str, ...], exits: tuple[int, int, int, int], code: int, parts: int
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "run.sh", tmp_path / "tests")
    calls = tmp_path / "calls"
    Setup._script(tmp_path / "setup_env.sh", "#!/bin/sh\n")
    pytest_stand_in = f"""#!/usr/bin/env bash
        [[ $* != "-m coverage report --format total" ]] || exit {exits[3]}
        [[ $* == *pytest* ]] || exit 0
        echo "$*" >>"{calls}"
        [[ $* == *"not vllm and not slow"* ]] && exit {exits[0]}
        [[ $* == *"slow and not vllm"* ]] && exit {exits[1]}
        exit {exits[2]}
    """
    Setup._script(tmp_path / ".venv" / "bin" / "python", pytest_stand_in)
    done = subprocess.run([str(tmp_path / "tests" / "run.sh"), *words], timeout=30)
    assert done.returncode == code
    assert len(calls.read_text().splitlines()) == parts
