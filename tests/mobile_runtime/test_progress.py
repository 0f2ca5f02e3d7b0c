"""What takes long tells on a terminal what it is doing, and leaves nothing of that behind."""

import io
import sys
import time
from pathlib import Path

import pytest

from mobile_runtime import progress
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from tests.bundles import make_bundle


class Terminal(io.StringIO):
    """What stderr is where a person looks at it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("progress") / "bundle")


def a_terminal(monkeypatch: pytest.MonkeyPatch, after_s: float = 0.0) -> Terminal:
    """A terminal in stderr's place, for work that is told from its first millisecond.

    No fixture: pytest puts its own stderr back before a test begins.
    """
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "AFTER_S", after_s)
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    return terminal


def shown(terminal: Terminal) -> list[str]:
    """Each thing that stood on the line."""
    return [text.strip() for text in terminal.getvalue().split("\r")]


def test_what_runs_is_told_with_the_time_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with progress.told("first") as tell:
        time.sleep(0.05)
        tell("second")
    texts = shown(terminal)
    assert texts.count("first 00:00") > 1
    assert "second 00:00" in texts
    assert texts[-1] == ""  # the line is wiped


def test_what_is_done_soon_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch, after_s=60.0)
    with progress.told("first") as tell:
        tell("second")
        time.sleep(0.02)
    assert terminal.getvalue() == ""


def test_nothing_is_told_where_nobody_looks(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    monkeypatch.setattr(progress, "TICK_S", 0.001)
    assert run_cli(main, ["profile", str(bundle.path), "-o", str(tmp_path)]) == 0
    assert run_cli(main, ["bench", str(bundle.path), "--rounds", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_a_profile_tells_its_component(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = a_terminal(monkeypatch)
    assert run_cli(main, ["profile", str(bundle.path), "-o", str(tmp_path)]) == 0
    for entry in bundle.manifest.components:
        assert any(text.startswith(f"profile {entry.name}") for text in shown(terminal))


def test_a_bench_counts_its_calls_to_the_end(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = a_terminal(monkeypatch)
    assert run_cli(main, ["bench", *[str(bundle.path)] * 2, "--rounds", "5"]) == 0
    # Four parts, two bundles: five rounds, and twice a first call and two that warm up.
    texts = shown(terminal)
    assert any("pipeline" in text and "/88 " in text for text in texts)
    last = [text for text in texts if "/88" in text][-1]
    assert int(last.split("/88")[0].split()[-1]) > 66


def test_runtimes_beside_each_other_tell_where_they_are(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = a_terminal(monkeypatch)
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    assert run_cli(main, ["matrix", *[str(bundle.path)] * 2]) == 0
    assert any("unet in onnxruntime" in text for text in shown(terminal))
    argv = ["matrix", str(bundle.path), "--device", "local", "--device", f"folder:{tmp_path / 'x'}"]
    assert run_cli(main, argv) == 1
    assert any("tiny on local" in text for text in shown(terminal))
