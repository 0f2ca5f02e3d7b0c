"""A job folder asks for what a bundle's goldens say; a result belongs to one job and bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.errors import BundleError, UserError, run_cli
from mobile_runtime.job_runner import main, run_job
from mobile_runtime.jobs import Job, Record, Result, ResultError, make_job, open_job
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("jobs") / "bundle")


@pytest.fixture(scope="module")
def made(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job and its result."""
    folder = tmp_path_factory.mktemp("made")
    make_job(bundle, folder / "job", "onnxruntime", {"threads": 1}, repeats=3)
    run_job(folder / "job", bundle, folder / "result")
    return folder / "job", folder / "result"


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be damaged."""
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "job", tmp_path / "result"


def test_a_job_holds_the_golden_inputs_of_every_task(bundle: Bundle, made: Any) -> None:
    job, inputs = open_job(made[0])
    golden = bundle.manifest.golden
    prompts = [f"prompt-{k}" for k in range(len(golden.prompts))]
    assert [task.name for task in job.tasks] == ["text_encoder", "unet", "vae_decoder", *prompts]
    assert [task.cases for task in job.components] == list(golden.cases.values())
    for name, relative in golden.components.items():
        stored = bundle.golden(relative)
        for key in (key for key in stored if "/in/" in key):
            np.testing.assert_array_equal(inputs[f"{name}/{key.replace('/in/', '/')}"], stored[key])
    for k in range(len(golden.prompts)):
        noise = bundle.golden(golden.pipeline)[f"{k}/noise"]
        np.testing.assert_array_equal(inputs[f"prompt-{k}/noise"], noise)


def test_two_jobs_of_a_bundle_are_not_the_same(bundle: Bundle, tmp_path: Path) -> None:
    first, second = (make_job(bundle, tmp_path / name, "onnxruntime") for name in "ab")
    assert first.id != second.id


def test_a_result_has_the_tensors_the_times_and_the_device(bundle: Bundle, made: Any) -> None:
    job, _ = open_job(made[0])
    result = Result(made[1], job)
    assert result.missing() == []
    facts = result.device()
    assert facts is not None
    assert facts.device
    assert facts.environment.libraries["onnxruntime"]
    assert not facts.emulated
    stored = bundle.golden(bundle.manifest.golden.components["unet"])
    record = result.record("unet")
    assert record is not None
    tensors = result.tensors(record)
    np.testing.assert_allclose(tensors["0/out_sample"], stored["0/out/out_sample"], atol=1e-4)
    np.testing.assert_array_equal(tensors["again/out_sample"], tensors["0/out_sample"])
    assert record.timing is not None
    assert len(record.timing.times_ms) == 3
    assert (record.peak_bytes or 0) > 1e6
    drawn = result.record("prompt-0")
    assert drawn is not None
    assert drawn.timing is not None
    assert set(drawn.timing.parts_ms) == {"text_encoder", "unet", "vae_decoder"}
    wanted = bundle.golden(bundle.manifest.golden.pipeline)["0/picture"]
    assert np.abs(result.tensors(drawn)["picture"].astype(int) - wanted).max() <= 1


def test_a_second_run_does_only_what_is_missing(bundle: Bundle, copied: Any) -> None:
    job, _ = open_job(copied[0])
    names = [task.name for task in job.tasks]
    (copied[1] / "unet.json").unlink()
    (copied[1] / "prompt-0.safetensors").write_bytes(b"cut")
    before = {
        name: (copied[1] / f"{name}.json").stat().st_mtime_ns for name in names if name != "unet"
    }
    assert Result(copied[1], job).missing() == ["unet", "prompt-0"]
    result = run_job(copied[0], bundle, copied[1])
    assert result.missing() == []
    kept = {n for n in before if (copied[1] / f"{n}.json").stat().st_mtime_ns == before[n]}
    assert kept == set(names) - {"unet", "prompt-0"}


def test_a_model_that_does_not_load_is_told_and_the_others_run(
    tmp_path: Path,
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make_job(bundle, tmp_path / "job", "onnxruntime", repeats=0)
    bundle.file(bundle.component("unet").path).write_bytes(b"no model")
    result = run_job(tmp_path / "job", bundle, tmp_path / "result")
    records = {task.name: result.record(task.name) for task in result.job.tasks}
    assert {name: record.status for name, record in records.items() if record} == {
        "text_encoder": "done",
        "unet": "fail",
        "vae_decoder": "done",
        **{f"prompt-{k}": "fail" for k in range(len(bundle.manifest.golden.prompts))},
    }
    assert records["unet"] is not None
    assert "is no ONNX model" in records["unet"].reason


def test_a_runtime_that_is_not_there_is_not_run(bundle: Bundle, tmp_path: Path) -> None:
    make_job(bundle, tmp_path / "job", "onnxruntime", {"providers": ["QNNExecutionProvider"]})
    result = run_job(tmp_path / "job", bundle, tmp_path / "result")
    record = result.record("unet")
    assert record is not None
    assert record.status == "not_run"
    assert "unknown execution provider" in record.reason


def test_noise_that_a_schedule_adds_is_in_the_job(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", stochastic=True, guidance_scale=0.0)
    job = make_job(bundle, tmp_path / "job", "onnxruntime", prompts=[0], repeats=0)
    assert [task.fresh_noise for task in job.prompts] == [True]
    result = run_job(tmp_path / "job", bundle, tmp_path / "result")
    record = result.record("prompt-0")
    assert record is not None
    stored = bundle.golden(bundle.manifest.golden.pipeline)["0/trajectory"]
    np.testing.assert_allclose(result.tensors(record)["trajectory"], stored, atol=1e-3)


def test_a_job_of_another_bundle_is_refused(made: Any, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", steps=(2,))
    with pytest.raises(UserError, match="is not the bundle that the job"):
        run_job(made[0], other, tmp_path / "result")
    assert not (tmp_path / "result").exists()


def rewritten(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"job": "0" * 32}, "of another job"),
        ({"manifest_sha256": "0" * 64}, "of another bundle"),
        ({"task": "vae_decoder"}, "of another task"),
        ({"status": "passed"}, "no sound record: status"),
        ({"extra": 1}, "no sound record: extra"),
        ({"peak_bytes": float("nan")}, "no sound record"),
    ],
)
def test_a_record_that_is_not_this_jobs_is_refused(
    values: dict[str, Any], told: str, copied: Any
) -> None:
    job, _ = open_job(copied[0])
    rewritten(copied[1] / "unet.json", **values)
    with pytest.raises(ResultError, match=told):
        Result(copied[1], job).record("unet")
    assert Result(copied[1], job).missing() == ["unet"]


def test_tensors_are_those_that_the_record_names(copied: Any) -> None:
    job, _ = open_job(copied[0])
    result = Result(copied[1], job)
    path = copied[1] / "unet.safetensors"
    tensors = load_file(path)
    tensors["0/out_sample"][0, 0, 0, 0] += 1e-3
    save_file(tensors, path)
    record = result.record("unet")
    assert record is not None
    with pytest.raises(ResultError, match="not what its record says"):
        result.tensors(record)


def test_damaged_inputs_are_refused(copied: Any, bundle: Bundle, tmp_path: Path) -> None:
    path = copied[0] / "inputs.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="make the job again"):
        run_job(copied[0], bundle, tmp_path / "new")


def test_a_job_that_names_a_path_is_refused(copied: Any) -> None:
    data = json.loads((copied[0] / "job.json").read_text())
    data["components"][0]["component"] = "../../etc"
    (copied[0] / "job.json").write_text(json.dumps(data))
    with pytest.raises(ResultError, match="no sound job"):
        open_job(copied[0])


def test_the_command_runs_a_job(bundle: Bundle, made: Any, tmp_path: Path, capsys: Any) -> None:
    argv = [str(made[0]), str(bundle.path), "-o", str(tmp_path / "result")]
    assert run_cli(main, [*argv, "--emulated"]) == 0
    assert "unet: done" in capsys.readouterr().out
    job, _ = open_job(made[0])
    result = Result(tmp_path / "result", job)
    facts, record = result.device(), result.record("unet")
    assert facts is not None
    assert record is not None
    assert facts.emulated
    assert record.peak_bytes is None


def test_types_survive_their_files(made: Any) -> None:
    job, _ = open_job(made[0])
    assert Job.model_validate_json(job.model_dump_json()) == job
    record = Result(made[1], job).record("prompt-0")
    assert record is not None
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert record.tensors_sha256 == sha256(made[1] / "prompt-0.safetensors")
