"""The packages that the README names are enough for all three scripts, and one that is missing is named at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from batch_inference.core import packages
from batch_inference.core.packages import missing_to_analyse, missing_to_measure
from conftest import REPOSITORY, SMALL_GRID, STUB, experiment_command

# What `pip install vllm torch pandas matplotlib seaborn` brings and our programs use ..
BROUGHT = "numpy tqdm psutil msgspec filelock huggingface_hub jinja2 markupsafe vllm torch pandas matplotlib seaborn"
# .. and what these import in turn.
IN_TURN = "mpl_toolkits dateutil six pytz tzdata PIL contourpy cycler fontTools kiwisolver packaging pyparsing pylab"
BLOCKER = """
import sys
import types
ALLOWED = sys.stdlib_module_names | set({allowed!r}.split()) - set({missing!r}.split())

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        # What the interpreter itself looks for has an underscore, or is in a .pth file of the environment.
        if top not in ALLOWED and not top.startswith("_"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker)
"""


class Blocked:
    """Programs in a Python that has only some packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: list[str], missing: str = "") -> CompletedProcess[str]:
        ours = "batch_inference analyze_results batch_inference_experiment"
        blocker = BLOCKER.format(allowed=f"{BROUGHT} {IN_TURN} {ours}", missing=missing)
        (self.folder / "sitecustomize.py").write_text(blocker)
        path = os.pathsep.join(map(str, (self.folder, STUB)))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=environment, check=False, timeout=60
        )


@pytest.fixture
def blocked(tmp_path: Path) -> Blocked:
    return Blocked(tmp_path)


def analysis(*flags: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "analyze_results.py"), "--input", *flags]


@pytest.mark.parametrize("package", ["tabulate", "scipy", "pynvml", "pytest"])
def test_the_blocker_blocks(blocked: Blocked, package: str) -> None:
    done = blocked.run([sys.executable, "-c", f"import {package}"])
    assert f"No module named '{package}'" in done.stderr


@pytest.mark.slow
def test_what_the_readme_installs_is_enough(blocked: Blocked, tmp_path: Path) -> None:
    """Measured with the stub to the end, and analysed with every plot."""
    done = blocked.run(experiment_command(tmp_path, *SMALL_GRID))
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout
    done = blocked.run(analysis(str(tmp_path / "tp_1_results.json")))
    assert (done.returncode, done.stderr) == (0, "")
    shutil.copytree(REPOSITORY / "tests" / "golden", tmp_path / "golden")
    done = blocked.run(analysis(str(tmp_path / "golden")))
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "golden" / "analysis").glob("throughput*.png"))


MEASURING = "not installed: pip install vllm torch pandas matplotlib seaborn; without a GPU: ./setup_env.sh"


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("vllm", f"vllm is {MEASURING}"),
        ("vllm torch tqdm", f"vllm, torch are {MEASURING}"),
        ("tqdm", "tqdm is not installed: pip install tqdm"),
        ("msgspec psutil", "msgspec, psutil are not installed: pip install msgspec psutil"),
    ],
)
def test_what_measuring_lacks_is_said_before_anything_loads(
    blocked: Blocked, tmp_path: Path, missing: str, told: str
) -> None:
    done = blocked.run(experiment_command(tmp_path, *SMALL_GRID), missing)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")
    assert list(tmp_path.glob("*_results*")) == []


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("pandas", "pandas is not installed: pip install pandas matplotlib seaborn"),
        ("pandas matplotlib", "pandas, matplotlib are not installed: pip install pandas matplotlib seaborn"),
        ("msgspec", "msgspec is not installed: pip install pandas matplotlib seaborn msgspec"),
    ],
)
def test_what_the_analysis_lacks_is_said_before_it_reads(blocked: Blocked, missing: str, told: str) -> None:
    done = blocked.run(analysis(str(REPOSITORY / "docs" / "h100" / "study")), missing)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")


@pytest.mark.slow
def test_without_plots_nothing_that_draws_is_needed(blocked: Blocked, tmp_path: Path) -> None:
    flags = ("--no-plots", "--output-dir", str(tmp_path / "out"))
    done = blocked.run(analysis(str(REPOSITORY / "tests" / "golden"), *flags), "matplotlib seaborn")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("preset", "missing", "told"),
    [
        ("tensor-parallel", "vllm", f"vllm is {MEASURING}"),
        # It is analysed in the end.
        ("quickstart", "seaborn", "seaborn is not installed: pip install pandas matplotlib seaborn"),
    ],
)
def test_what_a_preset_lacks_is_said_before_its_first_setting(
    blocked: Blocked, preset: str, missing: str, told: str
) -> None:
    done = blocked.run([str(REPOSITORY / "run_batch_experiments.sh"), preset], missing)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {told}"
    assert "[1/" not in done.stderr


ALL = ("vllm", "torch", "msgspec", "psutil", "tqdm", "pandas", "matplotlib", "seaborn")
DRAWING = "pip install pandas matplotlib seaborn"


@pytest.mark.parametrize(
    ("gone", "measuring", "analysing", "without_plots"),
    [
        ("", None, None, None),
        ("vllm", f"vllm is {MEASURING}", None, None),
        ("vllm tqdm pandas", f"vllm is {MEASURING}", *[f"pandas is not installed: {DRAWING}"] * 2),
        ("torch", "torch is not installed: pip install torch", None, None),
        ("torch psutil tqdm", "torch, psutil, tqdm are not installed: pip install torch psutil tqdm", None, None),
        ("matplotlib seaborn", None, f"matplotlib, seaborn are not installed: {DRAWING}", None),
        (
            "msgspec", "msgspec is not installed: pip install msgspec",
            *[f"msgspec is not installed: {DRAWING} msgspec"] * 2,
        ),
        (
            "seaborn pandas", None,
            f"pandas, seaborn are not installed: {DRAWING}", f"pandas is not installed: {DRAWING}",
        ),
        (
            " ".join(ALL), f"vllm, torch are {MEASURING}",
            f"msgspec, pandas, matplotlib, seaborn are not installed: {DRAWING} msgspec",
            f"msgspec, pandas are not installed: {DRAWING} msgspec",
        ),
    ],
)  # fmt: skip
def test_every_package_that_is_not_there_is_named_with_what_installs_it(
    gone: str, measuring: str | None, analysing: str | None, without_plots: str | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(packages, "_is_installed", lambda name: ALL.index(name) >= 0 and name not in gone.split())
        told = (missing_to_measure(), missing_to_analyse(plots=True), missing_to_analyse(plots=False))
    assert told == (measuring, analysing, without_plots)


def test_a_package_that_cannot_be_looked_for_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages._is_installed("json")
    assert not packages._is_installed("there_is_none_of_this_name")
    # What is in sys.modules without a specification.
    monkeypatch.setitem(sys.modules, "halfway", types.ModuleType("halfway"))
    assert not packages._is_installed("halfway")
    assert not packages._is_installed("there_is_none_of_this_name.inner")


# setup_env.sh without its last line, which calls it all; pip says an index and an extra one, and WHEELS is a folder.
SAYS_TO_UV = """
source <(sed '$d' "$0")
pip_setting() { echo https://pip/simple; }
usable_indexes() { echo https://extra/simple; }
folders=(/wheels /more)
export_uv_settings
env | grep ^UV_ | sort
"""


def test_what_the_user_tells_uv_stands_before_what_pip_was_told() -> None:
    def told(**own: str) -> list[str]:
        script = str(REPOSITORY / "setup_env.sh")
        return subprocess.run(
            ["bash", "-c", SAYS_TO_UV, script], env={"PATH": os.environ["PATH"], **own}, stdout=subprocess.PIPE,
            text=True, check=True,
        ).stdout.splitlines()  # fmt: skip

    assert told() == [
        "UV_DEFAULT_INDEX=https://pip/simple", "UV_FIND_LINKS=/wheels,/more", "UV_INDEX=https://extra/simple",
    ]  # fmt: skip
    assert told(UV_DEFAULT_INDEX="https://own", UV_INDEX="https://own/extra") == [
        "UV_DEFAULT_INDEX=https://own", "UV_FIND_LINKS=/wheels,/more", "UV_INDEX=https://own/extra",
    ]  # fmt: skip
