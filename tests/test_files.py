"""What is no regular file is neither written, nor replaced, nor waited for; a link is followed."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import analyze_results
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.files import (
    check_no_link,
    check_regular,
    check_writable,
    open_regular,
    read_regular,
    real,
    write_whole,
)
from batch_inference.core.growing_file import GrowingFile
from batch_inference.core.result_file import (
    ResultFileError,
    journal_of,
    load_result,
    read_heading,
    save_result,
)
from batch_inference.measure.engine_process import read_log_tail
from batch_inference.measure.locks import holder_of, lock_of, locked
from batch_inference.measure.logs import empty_log
from batch_inference.measure.study import check_writable_paths, claimed
from batch_inference.plan.model import read_model_facts
from builders import make_point, make_result, save_all


@pytest.fixture(params=["fifo", "link to a fifo", "socket"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "special.json"
    if request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            yield path
        return
    if request.param == "fifo":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    yield path


WAYS: dict[str, Callable[[Path], object]] = {
    "read": read_regular,
    "write": lambda path: write_whole(path, ["x"]),
    "append": lambda path: open_regular(path, "ab"),
    "check": check_writable,
    "log": empty_log,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_regular_file_is_refused_and_stays(special: Path, way: str) -> None:
    before = os.lstat(special)
    with pytest.raises(OSError, match="it is not a regular file"):
        WAYS[way](special)
    after = os.lstat(special)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert len(list(special.parent.iterdir())) in (1, 2)


def test_a_result_that_is_no_regular_file_is_named(special: Path) -> None:
    assert read_heading(special) is None
    with pytest.raises(ResultFileError, match=r"special\.json: cannot be read: it is not a regular file"):
        load_result(special)
    with pytest.raises(ResultFileError, match=r"special\.json: cannot be written: it is not a regular file"):
        save_result(make_result(), special)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_file_that_is_no_regular_file_is_wrong_use(special: Path, overwrite: bool) -> None:
    config = ExperimentConfig(output_file=str(special), overwrite=overwrite)
    with (
        pytest.raises(ConfigError, match=r"--output-file \S+special\.json: .*it is not a regular file"),
        claimed(config, make_result().environment),
    ):
        pass
    assert not special.is_file()


def test_a_log_that_is_no_regular_file_is_wrong_use(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.log")
    with pytest.raises(ConfigError, match=r"x\.log cannot be written: it is not a regular file"):
        check_writable_paths(ExperimentConfig(output_file=str(tmp_path / "x.json")))
    assert read_log_tail(tmp_path / "x.log") == []


@pytest.mark.parametrize("name", ["x.log", "x.replica_1.log", "x.json.journal", ".x.json.lock"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "link into nowhere"])
def test_what_stands_beside_a_result_and_cannot_be_written_is_named(tmp_path: Path, name: str, kind: str) -> None:
    beside = tmp_path / name
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "folder":
        beside.mkdir()
    else:
        beside.symlink_to(name if kind == "link to itself" else "no_folder/x")
    config = ExperimentConfig(output_file=str(tmp_path / "x.json"), data_parallel_size=2)
    before = os.lstat(beside)
    wrong = rf"--output-file \S+: {re.escape(name)} cannot be written: "
    with pytest.raises(ConfigError, match=wrong), claimed(config, make_result().environment):
        pass
    assert os.path.samestat(before, os.lstat(beside))
    assert list(tmp_path.iterdir()) == [beside]


def test_a_lock_that_is_no_lock_is_not_touched(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    wanted.write_text("wanted")
    lock = lock_of(tmp_path / "x.json")
    lock.symlink_to(wanted)
    with pytest.raises(OSError, match="it is a link"), locked(lock, "x"):
        pass
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(OSError, match="it is not a regular file"), locked(lock, "x"):
        pass
    assert holder_of(tmp_path / "x.json") is None
    assert wanted.read_text() == "wanted"


def test_a_journal_that_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_result(make_result(points=[make_point()]), path)
    os.mkfifo(journal_of(path))
    assert len(load_result(path).points) == 1


@pytest.mark.parametrize("line", ["no JSON", "{}", "[" * 5000, "\x00"])
def test_a_journal_that_is_none_is_named_and_not_the_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.json"
    save_result(make_result(points=[make_point()]), path)
    journal_of(path).write_text(f"{line}\n")
    with pytest.raises(ResultFileError, match=r"x\.json\.journal: has no points of x\.json .*; move it away$"):
        load_result(path)


def test_a_model_config_that_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read .*it is not a regular file"):
        read_model_facts(str(tmp_path))


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "y.json", tmp_path / "x.json"
    link.symlink_to(target)
    check_writable(link)
    for name in ("old", "new"):
        save_result(make_result(name), link)
        assert link.is_symlink()
        assert load_result(target).name == name
    assert list(target.parent.iterdir()) == [target]


def test_two_names_of_one_file_share_its_lock_and_its_journal(tmp_path: Path) -> None:
    target, link = tmp_path / "y.json", tmp_path / "x.json"
    link.symlink_to(target)
    assert lock_of(link) == lock_of(target)
    file = GrowingFile(link, make_result())
    file.begin()
    file.add(make_point(1))
    file.add(make_point(2))
    file.add(make_point(4))
    file.close()
    assert len(load_result(target).points) == len(load_result(link).points) == 3


def test_a_loop_of_links_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.symlink_to(path)
    with pytest.raises(ResultFileError, match="Too many levels of symbolic links"):
        save_result(make_result(), path)


def test_a_log_is_made_empty_but_not_through_a_link(tmp_path: Path) -> None:
    log, link = tmp_path / "x.log", tmp_path / "y.log"
    log.write_text("of an earlier sweep")
    link.symlink_to(log)
    empty_log(link)
    assert log.read_text() == "of an earlier sweep"
    empty_log(log)
    assert log.read_text() == ""


def test_a_log_that_has_another_name_too_is_left_to_that(tmp_path: Path) -> None:
    log, backup = tmp_path / "x.log", tmp_path / "backup.log"
    log.write_text("of an earlier sweep")
    backup.hardlink_to(log)
    empty_log(log)
    assert (log.read_text(), backup.read_text()) == ("", "of an earlier sweep")


@pytest.mark.parametrize("name", ["report.md", "report.html", "results.csv", "summary.json"])
def test_an_analysis_replaces_nothing_but_files(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_all([make_result(points=[make_point()])], tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / name)
    assert analyze_results.main(["--input", str(tmp_path / "in"), "--no-plots", "--output-dir", str(out)]) == 2
    assert (out / name).is_fifo()
    assert f"error: --output-dir {out}: cannot be written to: it is not a regular file" in capsys.readouterr().err


def test_a_file_is_written_beside_and_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, beside, seen = tmp_path / "x.json", tmp_path / f".x.json.{os.getpid()}.tmp", []
    path.write_text("old")

    def synced(_: int) -> None:
        seen.append((sorted(file.name for file in tmp_path.iterdir()), beside.read_text("utf-8"), path.read_text()))

    monkeypatch.setattr(os, "fsync", synced)
    write_whole(path, iter(["ä", "b"]))
    assert seen == [([beside.name, "x.json"], "äb", "old")]
    assert path.read_bytes() == "äb".encode()
    check_writable(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_the_way_is_said_with_its_number_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    told = {}
    for name in ("folder", "file", "link", "fifo", "absent"):
        for check in (check_regular, check_no_link):
            try:
                check(tmp_path / name)
            except OSError as error:
                place = Path(error.filename).name
                told[place, check.__name__] = (type(error), error.errno, error.strerror)
    folder = (IsADirectoryError, errno.EISDIR, "Is a directory")
    fifo = (OSError, errno.EINVAL, "it is not a regular file")
    assert told == {
        ("folder", "check_regular"): folder,
        ("folder", "check_no_link"): folder,
        ("link", "check_no_link"): (OSError, errno.ELOOP, "it is a link"),
        ("fifo", "check_regular"): fifo,
        ("fifo", "check_no_link"): fifo,
    }
    assert real(tmp_path / "link") == real(tmp_path / "file") == Path(os.path.realpath(tmp_path)) / "file"
    with open_regular(tmp_path / "link", "w", encoding="latin-1") as file:
        assert (file.mode, file.encoding) == ("w", "latin-1")
        file.write("é")
    assert read_regular(tmp_path / "file") == b"\xe9"


def test_why_nothing_can_be_written_is_said_as_the_disk_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "not yours")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="not yours"):
        check_writable(tmp_path / "x.json")
