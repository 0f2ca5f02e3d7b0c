"""What a command says and returns when something goes wrong."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mobile_runtime.errors import GateError, UserError, run_cli

ROOT = Path(__file__).parents[2]


def run_raising(error: BaseException) -> int:
    def main(argv: list[str]) -> int:
        raise error

    return run_cli(main, [])


@pytest.mark.parametrize(("error", "code"), [(UserError("no such"), 2), (GateError("low"), 1)])
def test_an_error_of_the_project_is_its_sentence_and_its_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(error) == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR])
def test_a_file_that_cannot_be_used_is_one_sentence_and_code_2(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(OSError(number, os.strerror(number), "some/file")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: some/file: {os.strerror(number)}; check the path")
    assert error.count("\n") == 1


def test_a_failed_rename_names_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(OSError(errno.EXDEV, "Invalid link", ".x.partial", None, "the target")) == 2
    assert capsys.readouterr().err.startswith("error: the target: Invalid link")


def test_a_full_disk_is_told_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(OSError(errno.ENOSPC, "No space left on device", "x.png")) == 2
    assert "the disk is full while writing x.png; free space" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback_and_is_never_taken_for_a_missed_gate(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(error) == 70
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last)")
    assert told.splitlines()[-1].startswith("this is a bug in pocket-diffusion; please report it")


def test_an_interrupt_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_a_reader_that_has_gone_is_no_error() -> None:
    script = "import sys; from mobile_runtime.errors import run_cli; "
    script += "sys.exit(run_cli(lambda _: print('x' * 1_000_000) or 0, []))"
    command = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == ""
    command.stderr.close()
    assert command.wait() == 141


def test_the_callers_handler_of_sigterm_is_back_when_the_command_ends() -> None:
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert run_cli(lambda _: int(signal.getsignal(signal.SIGTERM) is mine), []) == 0
        assert run_raising(UserError("x")) == 2
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_runs_in_a_thread_too() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_cli(lambda _: 0, [])))
    thread.start()
    thread.join()
    assert codes == [0]
