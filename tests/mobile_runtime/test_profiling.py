"""Where the time goes, as the runtimes' own profilers tell it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mobile_runtime.__main__ import main
from mobile_runtime.backends import executorch
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.goldens import golden_cases
from mobile_runtime.profiling import profile
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("profiling") / "bundle")


def test_every_operator_that_runs_is_timed_in_every_call(bundle: Bundle, tmp_path: Path) -> None:
    told = profile(bundle, "unet", tmp_path, repeats=5, threads=1)
    assert len(told.own_ms) == len(told.harness_ms) == 5
    kinds = {one.kind for one in told.operators}
    assert {"Conv", "Tanh"} <= kinds
    for one in told.operators:
        assert len(one.times_ms) == 5
    for call, own in enumerate(told.own_ms):
        assert sum(one.times_ms[call] for one in told.operators) <= own
        assert own <= told.harness_ms[call]
    assert isinstance(json.loads(told.trace.read_text()), list)


def test_the_table_tells_shares_and_both_clocks(bundle, tmp_path, capsys):
    argv = ["profile", str(bundle.path), "--repeats", "3", "-o", str(tmp_path / "traces")]
    assert run_cli(main, argv) == 0
    told = capsys.readouterr().out
    for entry in bundle.manifest.components:
        assert f"{entry.name} in onnxruntime" in told
        assert (tmp_path / "traces" / f"{entry.name}.trace.json").is_file()
    assert "between operators" in told
    assert "of the runtime's" in told
    assert run_cli(main, [*argv, "--component", "unet"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert run_cli(main, [*argv, "--component", "unet", "--json", "--force"]) == 0
    assert not list((tmp_path / "traces").glob(".*"))
    (row,) = json.loads(capsys.readouterr().out)
    assert row["component"] == "unet"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--component", "vae"], "choose one of"),
        (["--backend", "mil"], "choose one of: executorch, onnxruntime"),
        (["--backend", "executorch"], "does not read"),
        (["--option", "fast=1"], "unknown option"),
        (["--repeats", "0"], "take at least one"),
        (["--option", 'providers=["X"]'], "unknown execution provider"),
        (["--option", "providers=[]"], "unknown execution provider"),
    ],
)
def test_a_wrong_request_is_one_sentence(bundle, tmp_path, capsys, argv, sentence):
    try:
        code = run_cli(main, ["profile", str(bundle.path), "-o", str(tmp_path), *argv])
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, capsys):
    from tests.damages import rehash

    bundle = make_bundle(tmp_path / "bundle")
    (bundle.path / "unet/model.onnx").write_bytes(b"no model at all")
    rehash(bundle.path)
    argv = ["profile", str(bundle.path), "--component", "unet", "-o", str(tmp_path / "traces")]
    assert run_cli(main, argv) == 2
    assert "cannot load" in capsys.readouterr().err
    assert not (tmp_path / "traces").exists()


class Untraced:
    """A program of a build without the event tracer: it writes nothing."""

    def write_etdump_result_to_file(self, *paths: str) -> None:
        pass

    def execute(self, tensors: list[Any]) -> list[Any]:
        return tensors


def test_a_build_of_executorch_without_the_tracer_is_told(bundle, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(executorch, "_open", lambda path, traced: (Untraced(), Untraced()))
    feeds = golden_cases(bundle, "unet")[0].inputs
    with pytest.raises(UserError, match="EXECUTORCH_ENABLE_EVENT_TRACER"):
        executorch.profile(bundle, "unet", feeds, tmp_path, 0, 1)


@pytest.mark.filterwarnings("ignore")
def test_a_dump_of_executorchs_tracer_is_read(tmp_path):
    """A dump written by ExecuTorch's own serializer: two calls, of a delegate and an operator."""
    pytest.importorskip("executorch.devtools")
    from executorch.devtools.etdump import schema_flatcc as etdump
    from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

    def event(name: str, start: int, end: int, chain: int, instruction: int) -> Any:
        return etdump.Event(
            profile_event=etdump.ProfileEvent(
                name=name,
                chain_index=chain,
                instruction_id=instruction,
                delegate_debug_id_int=-1,
                delegate_debug_id_str="",
                delegate_debug_metadata=b"",
                start_time=start,
                end_time=end,
            ),
            allocation_event=None,
            debug_event=None,
        )

    # Nanoseconds: the delegate takes 2 ms and then 4, the operator 1 ms, a whole call 4 and 6 ms.
    runs = [
        etdump.RunData(
            name="forward",
            bundled_input_index=-1,
            allocators=[],
            events=[
                event("DELEGATE_CALL", 0, first * 1_000_000, 0, 0),
                event("native_call_add.out", first * 1_000_000, (first + 1) * 1_000_000, 0, 1),
                event("Method::execute", 0, (first + 2) * 1_000_000, -1, -1),
            ],
        )
        for first in (2, 4)
    ]
    content = serialize_to_etdump_flatcc(etdump.ETDumpFlatCC(version=0, run_data=runs))
    dump = tmp_path / "unet.etdump"
    dump.write_bytes(struct.pack("<I", len(content)) + content)  # the runtime's have their size
    whole, harness, operators, trace = executorch._read_dump(dump, (4.1, 6.1))
    assert whole == pytest.approx([4, 6])
    assert harness == (4.1, 6.1)
    assert {name: own for name, _, own in operators} == {
        "DELEGATE_CALL": pytest.approx((2, 4)),
        "native_call_add.out": pytest.approx((1, 1)),
    }
    assert [row["dur"] for row in json.loads(trace.read_text())] == pytest.approx([4000, 1000])
