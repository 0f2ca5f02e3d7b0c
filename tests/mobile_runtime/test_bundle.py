"""A bundle is whole and unchanged, or it does not open; writing one is all or nothing."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime.bundle import Bundle, BundleWriter
from mobile_runtime.errors import BundleError, UserError, run_cli
from tests.bundles import make_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def edit_manifest(bundle: Bundle, **changes: Any) -> None:
    """Write the manifest anew with top-level keys replaced; the file stays valid JSON."""
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")


def files_of(bundle: Bundle) -> list[dict[str, Any]]:
    return [entry.model_dump() for entry in bundle.manifest.files]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_bundle_opens_and_tells_its_components_and_goldens(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened.manifest == bundle.manifest
    assert opened.component("unet").inputs[0].shape == (2, 4, 8, 8)
    assert "0/in/sample" in opened.golden("golden/unet.safetensors")
    with pytest.raises(UserError, match="unknown component 'vae'; choose one of: text_encoder"):
        opened.component("vae")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_any_file_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = make_bundle(tmp_path_factory.mktemp("bundles") / "bundle")
    entry = data.draw(st.sampled_from(made.manifest.files))
    position = data.draw(st.integers(0, entry.bytes - 1))
    flip = data.draw(st.integers(1, 255))
    content = bytearray(made.file(entry.path).read_bytes())
    content[position] ^= flip
    made.file(entry.path).write_bytes(content)
    with pytest.raises(BundleError, match=f"{entry.path} has changed since it was made"):
        Bundle.open(made.path)


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    bundle.file("unet/model.onnx").unlink()
    with pytest.raises(BundleError, match=r"unet/model\.onnx is missing"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shortened_file_is_named_even_without_hashing(bundle: Bundle, verify: bool) -> None:
    path = bundle.file("unet/model.onnx")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"unet/model\.onnx has \d+ bytes, not \d+"):
        Bundle.open(bundle.path, verify=verify)


@pytest.mark.parametrize(
    "path",
    ["../outside", "/etc/passwd", "unet/../../outside", "..", "unet\\..\\..\\outside", "", "a\0b"],
)
def test_a_path_that_points_outside_is_refused(bundle: Bundle, path: str) -> None:
    files = files_of(bundle)
    (bundle.path.parent / "outside").write_text("secret")
    edit_manifest(bundle, files=[*files, files[0] | {"path": path}])
    with pytest.raises(BundleError, match="points outside the bundle"):
        Bundle.open(bundle.path)


def test_a_link_that_leads_outside_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    inside = bundle.file("unet/model.onnx")
    outside = tmp_path / "model.onnx"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(BundleError, match="points outside the bundle"):
        Bundle.open(bundle.path)


def test_a_linked_folder_that_leads_outside_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "unet").rename(tmp_path / "unet")
    (bundle.path / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(BundleError, match="points outside the bundle"):
        Bundle.open(bundle.path)


def test_a_bundle_opens_through_a_link_to_it(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    assert Bundle.open(tmp_path / "link").manifest == bundle.manifest


def test_a_newer_schema_asks_for_an_update(bundle: Bundle) -> None:
    edit_manifest(bundle, schema_version=2, brand_new_key=1)
    with pytest.raises(BundleError, match=r"schema 2.*knows up to 1; update pocket-diffusion"):
        Bundle.open(bundle.path)


def test_two_faults_in_a_manifest_are_told_together(bundle: Bundle) -> None:
    edit_manifest(bundle, misspelt=1, target="windows")
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle.path)
    assert "misspelt: Extra inputs are not permitted" in str(error.value)
    assert "target: Input should be 'onnx', 'coreml' or 'executorch'" in str(error.value)


@pytest.mark.parametrize("version", [None, True, "1", 1.0])
def test_a_schema_that_is_no_whole_number_is_refused(bundle: Bundle, version: Any) -> None:
    edit_manifest(bundle, schema_version=version)
    with pytest.raises(BundleError, match=rf"schema_version is {version!r}, not a whole number"):
        Bundle.open(bundle.path)


def test_a_manifest_without_a_schema_is_refused(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["schema_version"]
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="schema_version is None"):
        Bundle.open(bundle.path)


def changed(data: Any, path: str, value: Any) -> Any:
    """The value at a dotted path, replaced."""
    inner = data
    *above, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in above:
        inner = inner[key]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("schedules.0.rows", [], r"schedules\.0: a schedule of 2 steps has 0 rows$"),
        ("schedules.0.steps", 0, r"schedules\.0\.steps: Input should be greater than 0"),
        ("generation.latent_height", 0, "latent_height: Input should be greater than 0"),
        ("generation.scaling_factor", 0, "scaling_factor: Input should be greater than 0"),
        ("generation.default_steps", -1, "default_steps: Input should be greater than 0"),
        ("components.1.inputs", [], r"components\.1\.inputs: .*at least 1 item"),
        ("components.1.inputs.0.shape", [], r"inputs\.0\.shape: .*at least 1 item"),
        ("components.1.inputs.0.shape", [0, 4], "Input should be greater than 0"),
        ("components.1.name", "text_encoder", "manifest: there is no unet; the component text_enc"),
        ("golden.components", {}, "text_encoder has 3 golden cases and no file of them"),
        ("golden.conditioning_pairs", [[0, 77]], r"pair \(0, 77\) names a case that unet has not"),
        ("golden.prompts.0.seed", -1, "seed: Input should be greater than or equal to 0"),
        ("components.1.bytes", 1, "the component unet has 1 bytes, and its files have"),
        ("components.1.bytes", -5, r"components\.1\.bytes: Input should be greater than 0"),
        ("gates.component_snr_db", -1e9, "component_snr_db: Input should be greater than 0"),
        ("gates.picture_psnr_db", 0, "picture_psnr_db: Input should be greater than 0"),
        ("generation.guidance_scale", 7.5, "no golden prompt is drawn as an app draws by default"),
        ("generation.negative_prompt", "a rat", "no golden prompt is drawn as an app draws"),
        ("generation.default_steps", 9, "there is no schedule of 9 steps; no golden prompt"),
        ("golden.prompts.0.steps", 9, "there is no schedule of 9 steps"),
        ("components.1.macs", 10**400, r"components\.1\.macs: Input should be less than"),
        ("components.1.format", "ort", r"components\.1: unet/model.onnx is no file of the format"),
        ("components.1.outputs.0.layout", "NC", "the layout 'NC' does not name 4 axes"),
        ("components.1.inputs.0.layout", "NHWC", "unet has sample in the layout 'NHWC', and there"),
        ("arithmetic", "float16", "compute in float16, and there is no gate float16_snr_db"),
        (
            "files.1.path",
            "golden/pipeline.safetensors",
            "manifest: the file golden/pip.* is listed",
        ),
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_refused(
    bundle: Bundle, path: str, value: Any, complaint: str
) -> None:
    file = bundle.path / "manifest.json"
    file.write_text(json.dumps(changed(json.loads(file.read_bytes()), path, value)))
    with pytest.raises(BundleError, match=complaint) as error:
        Bundle.open(bundle.path)
    assert "Value error" not in str(error.value)


def test_two_schedules_of_a_number_of_steps_are_refused(bundle: Bundle) -> None:
    file = bundle.path / "manifest.json"
    data = json.loads(file.read_bytes())
    data["schedules"].append(data["schedules"][0])
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"there are two schedules of \d+ steps"):
        Bundle.open(bundle.path)


def test_a_link_in_a_circle_is_a_missing_file(bundle: Bundle) -> None:
    file = bundle.file("unet/model.onnx")
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(BundleError, match=r"unet/model\.onnx is missing"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema_version": ' + b"1" * 5000 + b"}"])
def test_a_manifest_that_python_cannot_read_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json is not valid JSON"):
        Bundle.open(tmp_path)
    with pytest.raises(UserError, match="is not a bundle"):
        BundleWriter.check_free(tmp_path, force=True)


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b'{"schema_version": "1"}', b""])
def test_a_manifest_that_is_none_is_one_sentence(bundle: Bundle, content: bytes) -> None:
    (bundle.path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json (is not valid JSON|does not hold)"):
        Bundle.open(bundle.path)


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(json.dumps).map(str.encode))
def test_no_manifest_content_escapes_as_another_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(folder)


def test_a_model_that_is_not_among_the_hashed_files_is_refused(bundle: Bundle) -> None:
    files = [entry for entry in files_of(bundle) if entry["path"] != "unet/model.onnx"]
    edit_manifest(bundle, files=files)
    with pytest.raises(BundleError, match=r"unet/model\.onnx is named but not among its files"):
        Bundle.open(bundle.path)


def test_goldens_of_a_type_that_numpy_does_not_have_are_told_by_name(bundle: Bundle) -> None:
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    content = len(header).to_bytes(8, "little") + header + b"\0"
    bundle.file("golden/unet.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"golden/unet\.safetensors cannot be read: .*float8"):
        bundle.golden("golden/unet.safetensors")


def test_damaged_goldens_are_told_by_name(bundle: Bundle) -> None:
    bundle.file("golden/unet.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BundleError, match=r"golden/unet\.safetensors cannot be read"):
        bundle.golden("golden/unet.safetensors")


def test_an_existing_output_is_kept_and_replaced_only_with_force(bundle: Bundle) -> None:
    before = bundle.manifest_sha256
    with pytest.raises(UserError, match=r"already exists; choose another --output, or .*--force"):
        make_bundle(bundle.path, steps=(1,))
    assert Bundle.open(bundle.path).manifest_sha256 == before
    make_bundle(bundle.path, steps=(1,), force=True)
    assert Bundle.open(bundle.path).manifest.schedules[0].steps == 1
    assert names_in(bundle.path.parent) == ["bundle"]


def test_force_does_not_replace_what_is_not_a_bundle(tmp_path: Path) -> None:
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "photo.jpg").write_text("irreplaceable")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(holiday)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for output in ("holiday", "file", "link", "dangling"):
        # Without --force, too: it is not suggested where it would not help.
        for force in (False, True):
            with pytest.raises(UserError, match="not a bundle, so --force will not replace it"):
                make_bundle(tmp_path / output, force=force)
    assert (holiday / "photo.jpg").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    "manifest",
    [
        {"manifest_version": 3, "name": "a web extension"},
        {"schema_version": True, "target": "onnx", "files": []},
        {"schema_version": 1, "target": "chrome", "files": []},
        {"schema_version": 1, "target": "onnx"},
        [],
    ],
)
def test_force_does_not_replace_a_folder_with_a_manifest_of_another_kind(
    tmp_path: Path, manifest: Any
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"not a bundle.*: it holds manifest\.json, which no conv"):
        BundleWriter.check_free(tmp_path, force=True)


@pytest.mark.parametrize("name", ["thesis.txt", "unet/thesis.txt", "new/.thesis"])
def test_force_does_not_replace_a_bundle_in_which_somebody_keeps_a_file(
    bundle: Bundle, name: str
) -> None:
    bundle.file(name).parent.mkdir(exist_ok=True)
    bundle.file(name).write_text("irreplaceable")
    with pytest.raises(UserError, match=f"it holds {name}, which no conversion made"):
        make_bundle(bundle.path, force=True)
    assert bundle.file(name).read_text() == "irreplaceable"


def test_force_does_not_replace_a_bundle_that_somebody_linked_a_folder_into(
    bundle: Bundle, tmp_path: Path
) -> None:
    bundle.file("pictures").symlink_to(tmp_path)
    with pytest.raises(UserError, match="it holds pictures, which no conversion made"):
        make_bundle(bundle.path, force=True)


@pytest.mark.parametrize("version", [0, 2])
def test_force_replaces_a_validated_a_damaged_and_an_older_or_newer_bundle(
    bundle: Bundle, version: int
) -> None:
    bundle.file("report.json").write_text("{}")
    bundle.file("report.html").write_text("<html>")
    bundle.file("unet/model.onnx").unlink()
    edit_manifest(bundle, schema_version=version, brand_new_key=1)
    make_bundle(bundle.path, steps=(1,), force=True)
    assert Bundle.open(bundle.path).manifest.schedules[0].steps == 1


def test_an_empty_folder_is_replaced_with_force(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replace it with --force"):
        make_bundle(tmp_path)
    make_bundle(tmp_path / "bundle").path.rename(tmp_path / "other")
    (tmp_path / "bundle").mkdir()
    make_bundle(tmp_path / "bundle", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_at_the_output_meanwhile_is_not_replaced(tmp_path: Path, force: bool) -> None:
    output = tmp_path / "bundle"
    manifest = make_bundle(tmp_path / "first").manifest

    def appear_and_commit() -> None:
        with BundleWriter(output, force) as writer:
            output.mkdir()
            (output / "thesis.txt").write_text("irreplaceable")
            writer.commit(manifest)

    with pytest.raises(UserError, match=r"it holds thesis\.txt"):
        appear_and_commit()
    assert (output / "thesis.txt").read_text() == "irreplaceable"
    assert names_in(tmp_path) == ["bundle", "first"]


def test_an_output_that_cannot_be_written_is_refused_by_the_check_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    outputs = [tmp_path / "file/bundle", tmp_path / "file/more/bundle", tmp_path / "dangling/x"]
    outputs += [tmp_path / ("x" * 300)]
    if sys.platform == "linux":
        outputs.append(Path("/proc/bundle"))  # not even root may
    for output in outputs:
        with pytest.raises(UserError, match=r"cannot write to .*; choose another --output"):
            BundleWriter.check_free(output, force=False)
    assert names_in(tmp_path) == ["dangling", "file"]


def test_a_folder_above_with_too_long_a_name_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write to .*File name too long"):
        make_bundle(tmp_path / ("x" * 300) / "bundle")


def test_a_read_only_file_system_is_a_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system; choose"):
        BundleWriter.check_free(tmp_path / "deep" / "bundle", force=False)
    assert list(tmp_path.iterdir()) == []


def fail_in_the_middle(output: Path) -> None:
    with BundleWriter(output) as writer:
        (writer.path / "model").write_text("half")
        raise RuntimeError("in the middle")


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle(tmp_path / "bundle")
    assert names_in(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from mobile_runtime.bundle import BundleWriter
from mobile_runtime.errors import run_cli
def main(argv):
    with BundleWriter(Path(argv[0]), force=True) as writer:
        (writer.path / "model").write_text("half")
        print("writing", flush=True)
        time.sleep(600)
sys.exit(run_cli(main))
"""


def start_writer(output: Path) -> "subprocess.Popen[str]":
    """A writer in a process of its own, stopped in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_writer_leaves_no_half_bundle_and_the_next_one_cleans_up(
    tmp_path: Path, exists: bool
) -> None:
    output = tmp_path / "bundle"
    if exists:
        before = make_bundle(output).manifest_sha256
    process = start_writer(output)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if exists:
        assert Bundle.open(output).manifest_sha256 == before
    else:
        assert not output.exists()
    make_bundle(output, force=True)
    assert names_in(tmp_path) == ["bundle"]


def test_the_check_alone_cleans_nothing_up(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "bundle")
    process.kill()
    process.communicate()
    (leftover,) = tmp_path.iterdir()
    BundleWriter.check_free(tmp_path / "bundle", force=False)
    assert list(tmp_path.iterdir()) == [leftover]


def test_a_writer_on_another_host_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared volume its process number says nothing here."""
    process = start_writer(tmp_path / "bundle")
    process.kill()
    process.communicate()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another.host")
        make_bundle(tmp_path / "bundle")
    assert len(list(tmp_path.glob(".bundle.*.partial/model"))) == 1
    make_bundle(tmp_path / "bundle", force=True)
    assert names_in(tmp_path) == ["bundle"]


def test_a_terminated_command_leaves_nothing(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "bundle")
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_a_writer_removes_no_leftovers_of_an_output_with_a_longer_name(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "bundle.v2")
    try:
        make_bundle(tmp_path / "bundle")
        assert len(list(tmp_path.glob(".bundle.v2.*.partial/model"))) == 1
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_leaves_the_first_ones_work_alone(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    process = start_writer(output)
    try:
        make_bundle(output)
        assert len(list(tmp_path.glob(".bundle.*.partial/model"))) == 1
    finally:
        process.kill()
        process.communicate()


def test_of_two_writers_without_force_the_later_one_does_not_replace(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    first = make_bundle(tmp_path / "first")
    with BundleWriter(output) as writer:
        for entry in first.manifest.files:
            copy = writer.path / entry.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(first.file(entry.path).read_bytes())
        other = make_bundle(output, steps=(1,)).manifest_sha256
        with pytest.raises(UserError, match="already exists"):
            writer.commit(first.manifest)
    assert Bundle.open(output).manifest_sha256 == other
    assert names_in(tmp_path) == ["bundle", "first"]


def test_a_kill_between_the_two_renames_loses_no_bundle(
    tmp_path: Path,
) -> None:
    """With --force the old bundle steps aside first; a kill right then must not lose it."""
    output = tmp_path / "bundle"
    before = make_bundle(output).manifest_sha256
    script = f"""
import os, signal
from pathlib import Path
from tests.bundles import make_bundle
rename = Path.rename
def killed(self, target):
    done = rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
    return done
Path.rename = killed
make_bundle(Path({str(output)!r}), steps=(1,), force=True)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    with BundleWriter(output, force=True):
        pass  # the next run starts, and stops without having made anything
    assert Bundle.open(output).manifest_sha256 == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    code = run_cli(lambda _: int(bool(make_bundle(tmp_path / "bundle"))), [])
    assert code == 2
    assert f"the disk of {tmp_path} is full; free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("named", "told"),
    [("/elsewhere/x", "the disk of /elsewhere/x is full"), (None, "or that of .*, is full")],
)
def test_another_full_disk_is_not_told_as_the_outputs(
    tmp_path: Path, named: str | None, told: str
) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "bundle"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)

    with pytest.raises(UserError, match=told):
        fail()


def test_a_really_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's own limit on file sizes stands for the disk's end."""
    script = f"""
import resource, signal
from pathlib import Path
from tests.bundles import make_bundle
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
make_bundle(Path({str(tmp_path / "bundle")!r}))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "File too large" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)]
)
def test_a_finished_bundle_has_the_permissions_of_any_new_file(
    tmp_path: Path, umask: int, folder: int, file: int
) -> None:
    """The goldens are written by safetensors, which by itself makes them their owner's alone."""
    before = os.umask(umask)
    try:
        bundle = make_bundle(tmp_path / "bundle")
    finally:
        os.umask(before)
    paths = [bundle.path, *bundle.path.rglob("*")]
    assert bundle.file("golden/unet.safetensors") in paths
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {folder}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {file}


def test_temporary_files_of_a_library_go_with_the_scratch_folder(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    with BundleWriter(tmp_path / "bundle") as writer:
        with writer.scratch() as scratch:
            package = Path(tempfile.mkdtemp())
            assert package.parent == scratch
            assert scratch.is_relative_to(writer.path)
            (package / "weights").write_text("left here by the library")
        assert tempfile.gettempdir() == before
        assert writer.hash_files() == ()
