"""Two bundles take turns, and their ratio is told with where it lies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_runtime import bench
from mobile_runtime.__main__ import main
from mobile_runtime.bench import alternate, ratio_of
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from mobile_runtime.manifest import Manifest
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle")


class Fake:
    """A call that takes as long as it is told, on a clock of its own."""

    load_ms = 1.0

    def __init__(self, name: str, log: list[str], takes: Callable[[int], float]) -> None:
        self.name, self.log, self.takes, self.calls = name, log, takes, 0

    def milliseconds(self, clock: Any) -> float:
        self.log.append(self.name)
        self.calls += 1
        return self.takes(len(self.log))


def test_calls_take_turns_after_warming_up() -> None:
    log: list[str] = []
    calls: Any = [Fake("a", log, lambda now: 1.0), Fake("b", log, lambda now: 2.0)]
    timings = alternate(calls, rounds=40, pause=lambda seconds: None)
    assert [len(timing.times_ms) for timing in timings] == [40, 40]
    assert [timing.warm_up for timing in timings] == [2, 2]
    rounds = [tuple(log[k : k + 2]) for k in range(6, len(log), 2)]
    assert {tuple(sorted(pair)) for pair in rounds} == {("a", "b")}
    assert 10 < sum(pair == ("a", "b") for pair in rounds) < 30  # in an order of their own


def test_a_drift_of_the_machine_does_not_reach_the_ratio() -> None:
    log: list[str] = []
    calls: Any = [
        Fake("a", log, lambda now: 1.0 * (1 + now / 20)),
        Fake("b", log, lambda now: 1.5 * (1 + now / 20)),
    ]
    first, second = alternate(calls, rounds=50, pause=lambda seconds: None)
    ratio = ratio_of([(first.times_ms, second.times_ms)])
    assert ratio.median == pytest.approx(1.5, rel=0.02)
    assert ratio.low <= ratio.median <= ratio.high


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=30))
def test_a_ratio_and_its_inverse_agree(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    ratio = ratio_of([(first, second)])
    assert ratio.low <= ratio.median * (1 + 1e-9)
    assert ratio.median <= ratio.high * (1 + 1e-9)
    swapped = ratio_of([(second, first)])
    assert ratio.median * swapped.median == pytest.approx(1)


def test_what_the_order_of_loading_costs_cancels_out() -> None:
    slow_first = [([1.05, 1.06, 1.05], [1.0, 1.0, 1.01]), ([1.0, 1.01, 1.0], [1.05, 1.06, 1.05])]
    assert ratio_of(slow_first).median == pytest.approx(1, abs=1e-3)


def test_one_bundle_has_a_row_for_each_part(bundle: Bundle, capsys: Any) -> None:
    assert run_cli(main, ["bench", str(bundle.path), "--rounds", "3"]) == 0
    told = capsys.readouterr().out
    for part in ("text_encoder", "unet", "vae_decoder", "pipeline"):
        assert f"\n{part} " in told
    assert "times as long" not in told


def test_a_bundle_beside_itself_takes_as_long(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    """A loose bound: how close it comes is a figure of BENCHMARKS.md."""
    file = tmp_path / "times.json"
    argv = ["bench", *[str(bundle.path)] * 2, "--rounds", "20", "--option", "threads=1"]
    assert run_cli(main, [*argv, "--json", str(file)]) == 0
    assert "times as long" in capsys.readouterr().out
    parts = json.loads(file.read_text())["parts"]
    assert [len(part["timings"]) for part in parts] == [2, 2, 2, 2]
    assert all(0.4 < part["ratio"]["median"] < 2.5 for part in parts)


def test_a_file_of_times_is_replaced_only_with_force(
    bundle: Bundle, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "times.json"
    argv = ["bench", str(bundle.path), "--rounds", "2", "--json", str(file)]
    assert run_cli(main, argv) == 0
    before = file.read_text()
    monkeypatch.setattr(bench, "Call", None)  # refused before anything is loaded
    assert run_cli(main, argv) == 2
    assert "times.json already exists; choose another --json, or add --force" in (
        capsys.readouterr().err
    )
    monkeypatch.undo()
    assert run_cli(main, [*argv, "--force", "--rounds", "3"]) == 0
    assert file.read_text() != before
    assert run_cli(main, [*argv[:-1], str(tmp_path), "--force"]) == 2
    assert "is no file that can be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--rounds", "1"], "should be 2 or more"),
        (["--option", "thread=1"], "unknown option"),
        (["--backend", "mil"], "says nothing about speed"),
        (["--json", "/nowhere/such/x.json", "--json", "/proc/x/y.json"], "choose another --json"),
    ],
)
def test_a_wrong_request_is_told(argv: list[str], told: str, bundle: Bundle, capsys: Any) -> None:
    assert run_cli(main, ["bench", str(bundle.path), *argv]) == 2
    assert told in capsys.readouterr().err
    assert run_cli(main, ["bench", *[str(bundle.path)] * 3]) == 2
    assert "one bundle, or two" in capsys.readouterr().err


def test_bundles_without_golden_inputs_are_told(tmp_path: Path, capsys: Any) -> None:
    def bare(manifest: Manifest) -> Manifest:
        golden = manifest.golden.model_copy(
            update={"cases": {}, "prompts": (), "conditioning_pairs": ()}
        )
        return manifest.model_copy(update={"golden": golden})

    empty = make_bundle(tmp_path / "bundle", change_manifest=bare)
    assert run_cli(main, ["bench", str(empty.path)]) == 2
    assert "hold no golden inputs" in capsys.readouterr().err
