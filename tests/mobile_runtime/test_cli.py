"""`python -m mobile_runtime`: what a user types, and what a user's mistake gets back."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.parity import picture_psnr_db
from mobile_runtime.pictures import contact_sheet, side_by_side, write_png
from mobile_runtime.pipeline import Pipeline
from mobile_runtime.report import read_report
from tests.bundles import make_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


def run(*argv: object) -> int:
    return run_cli(main, [str(arg) for arg in argv])


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_one_prompt_is_one_picture_that_says_how_it_was_made(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fox.png"
    command = ["generate", bundle.path, "red fox, café", "--seed", 7, "--steps", 2]
    assert run(*command, "--guidance", 2, "--negative", "the rat", "-o", output) == 0
    expected = Pipeline.from_bundle(bundle)(
        "red fox, café", seed=7, steps=2, guidance_scale=2.0, negative_prompt="the rat"
    )
    np.testing.assert_array_equal(read(output), expected.picture)
    with Image.open(output) as image:
        assert image.info == {
            "prompt": "red fox, café",
            "negative_prompt": "the rat",
            "seed": "7",
            "steps": "2",
            "guidance_scale": "2.0",
            "bundle": f"tiny {bundle.manifest_sha256}",
        }
    assert str(output) in capsys.readouterr().out


def test_several_prompts_and_seeds_are_numbered_files_and_a_contact_sheet(
    bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "pictures"
    assert (
        run("generate", bundle.path, "red fox", "The rat!", "--seeds", "0-1,9", "-o", output) == 0
    )
    assert sorted(path.name for path in output.iterdir()) == [
        "000-red-fox-0.png",
        "001-red-fox-1.png",
        "002-red-fox-9.png",
        "003-the-rat-0.png",
        "004-the-rat-1.png",
        "005-the-rat-9.png",
        "contact_sheet.png",
    ]
    assert read(output / "contact_sheet.png").shape[1] > 3 * 16


def test_the_default_output_is_named_after_the_prompt(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", bundle.path, "Red fox / ../etc", "--seed", 3) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["red-fox-etc-3.png"]


def test_a_picture_named_after_a_long_prompt_keeps_to_the_systems_length_of_names(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for prompt in ("星" * 200, "x" * 300, "\U00020000" * 100):
        assert run("generate", bundle.path, prompt, "--seed", 2**64 - 1) == 0
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(len(name.encode()) <= 145 and name.endswith(f"-{2**64 - 1}.png") for name in names)


def test_a_png_may_be_named_in_capitals(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "fox.PNG"
    assert run("generate", bundle.path, "red fox", "-o", output) == 0
    assert read(output).shape == (16, 16, 3)


def test_a_negative_prompt_without_guidance_is_warned_about_and_not_recorded(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", bundle.path, "red fox", "--negative", "blue", "-o"]
    assert run(*command, tmp_path / "without.png", "--guidance", 1) == 0
    assert "--negative has no effect without guidance" in capsys.readouterr().err
    with Image.open(tmp_path / "without.png") as image:
        assert "negative_prompt" not in image.info
    assert run(*command, tmp_path / "with.png") == 0
    assert capsys.readouterr().err == ""
    with Image.open(tmp_path / "with.png") as image:
        assert image.info["negative_prompt"] == "blue"


def test_an_existing_picture_is_replaced_only_with_force(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fox.png"
    output.write_bytes(b"mine")
    assert run("generate", bundle.path, "red fox", "-o", output) == 2
    assert "already exists; choose another --output, or add --force" in capsys.readouterr().err
    assert output.read_bytes() == b"mine"
    assert run("generate", bundle.path, "red fox", "-o", output, "--force") == 0
    assert read(output).shape == (16, 16, 3)


def test_an_output_that_cannot_be_made_is_refused_before_the_bundle_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "fox.png"
    assert run("generate", tmp_path / "no bundle", "red fox", "-o", output) == 2
    assert "no folder that can be written to" in capsys.readouterr().err


def test_compare_shows_reference_picture_and_difference_and_tells_the_psnr(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_bundle(tmp_path / "other", guidance_scale=1.0)
    output = tmp_path / "compared.png"
    assert run("generate", bundle.path, "red fox", "--compare", other.path, "-o", output) == 0
    ours, reference = (Pipeline.from_bundle(one)("red fox").picture for one in (bundle, other))
    assert f"{picture_psnr_db(reference, ours):.2f} dB" in capsys.readouterr().out
    np.testing.assert_array_equal(read(output), side_by_side(reference, ours))
    assert (
        run("generate", bundle.path, "fox", "--compare", bundle.path, "-o", tmp_path / "s.png") == 0
    )
    assert "inf dB from the reference" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_warned_about_with_what_it_loses(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "red " * 10 + "fox"
    assert run("generate", bundle.path, prompt, "-o", tmp_path / "p.png") == 0
    assert "is too long and loses 'fox'" in capsys.readouterr().err


def test_a_very_long_prompt_is_warned_about_in_a_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", bundle.path, "red fox " * 1200, "-o", tmp_path / "p.png") == 0
    told = capsys.readouterr()
    assert "is too long and loses" in told.err
    assert len(told.err) < 300
    assert len(told.out) < 300


@pytest.mark.parametrize("texts", [["red \udcff"], ["red", "--negative", "\udcff"]])
def test_a_prompt_that_is_not_utf_8_is_refused(
    bundle: Bundle, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", bundle.path, *texts, "-o", tmp_path / "p.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the prompt ")
    assert "\\udcff' is not UTF-8" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "3"], "no schedule compiled for 3 steps; choose: 2, 4"),
        (["--option", "thread=2"], "unknown option of the backend onnxruntime 'thread'"),
        (["--option", "threads"], "has no value"),
        (["--option", "threads=abc"], "the option threads of the backend onnxruntime cannot be"),
        (["--option", f"threads={'9' * 5000}"], "the option threads of the backend onnxruntime"),
        (["--option", "threads=-3"], "cannot be -3"),
        (["--option", "exact=maybe"], "exact of the backend onnxruntime cannot be 'maybe'"),
        (["--option", "bundle=1"], "unknown option of the backend onnxruntime 'bundle'"),
        (["-o", "x.jpg"], "pictures are PNG files; name a .png file or a folder, not x.jpg"),
        (["another", "-o", "x.JPEG"], "pictures are PNG files"),
        (["another", "-o", "one.PNG"], "one.PNG is one picture and 2 are asked for"),
        (["--backend", "executorch"], "executorch does not read"),
        (["--compare", "nowhere"], "nowhere is neither a bundle"),
        (["--seed", "-1"], "the seed -1 is out of range"),
        (["another", "-o", "one.png"], "one.png is one picture and 2 are asked for"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    bundle: Bundle,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", bundle.path, "red fox", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", tmp_path, "red fox"], ["info", tmp_path], ["validate", tmp_path]):
        assert run(*command) == 2
        assert "python -m converters.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["x", "1-", "", "1,,2", "5-2", "1,5-2"])
def test_seeds_that_are_none_are_refused(
    bundle: Bundle, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("generate", bundle.path, "red fox", "--seeds", text)
    assert stop.value.code == 2
    assert "write 0-3,7" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0-99999999999", "0-10000", "1,0-9999"])
def test_more_seeds_than_anyone_needs_are_refused_before_they_fill_the_memory(
    bundle: Bundle, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("generate", bundle.path, "red fox", "--seeds", text)
    assert stop.value.code == 2
    assert "names more than 10000 seeds" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "much"])
def test_a_guidance_that_is_no_finite_number_is_refused(
    bundle: Bundle, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("generate", bundle.path, "red fox", f"--guidance={text}")
    assert stop.value.code == 2
    assert "is no finite number" in capsys.readouterr().err


def validated(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> str:
    """What `info` tells of the validation."""
    assert run("info", bundle.path) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("validated: ")
    ]
    return line.removeprefix("validated: ")


def test_info_tells_the_verdict_and_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert run("validate", bundle.path, "--repeats", 0) == 0
    report = read_report(bundle)
    capsys.readouterr()
    assert validated(bundle, capsys) == f"pass, {report.created}"

    path = bundle.file("report.json")
    passed = path.read_text()
    for verdict, word in (("fail", "FAILED"), ("not_run", "NOT RUN")):
        first = report.checks[0].model_copy(update={"status": verdict, "gated": True})
        checks = (first, *report.checks[1:])
        told = {"verdict": verdict, "summary": "unet is all NaN", "checks": checks}
        path.write_text(report.model_copy(update=told).model_dump_json())
        assert validated(bundle, capsys) == f"{word}: unet is all NaN"
    forged = report.model_copy(update={"checks": checks})  # which do not pass
    for damaged in (passed[:100], "[]", "", forged.model_dump_json()):
        path.write_text(damaged)
        assert validated(bundle, capsys) == "the report is unreadable (not validated)"

    path.write_text(passed)
    assert run("validate", bundle.path, "--repeats", 0, "--gate", "picture_psnr_db=none") == 0
    capsys.readouterr()
    assert "gates from the command line: picture_psnr_db" in validated(bundle, capsys)

    other = make_bundle(bundle.path, guidance_scale=4.0, force=True)
    path.write_text(passed)
    assert validated(other, capsys) == "the report is of another manifest (not validated)"


def test_info_tells_what_a_bundle_holds(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", bundle.path) == 0
    told = capsys.readouterr().out
    for part in ("tiny: onnx", "16 x 16", "steps: 2, 4", "unet/model.onnx", "not validated yet"):
        assert part in told


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        ("validate", "-1", "-1 is too few; it has to be 0 or more"),
        ("validate", "one", "'one' is not a whole number"),
        ("validate", "1.5", "'1.5' is not a whole number"),
        ("profile", "-1", "take at least one"),
    ],
)
def test_repeats_that_are_none_are_refused(
    bundle: Bundle, command: str, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, bundle.path, "--repeats", text)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def helped(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*command, "--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_each_command_ends_with_examples_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = helped(capsys)
    commands = re.findall(r"^    ([a-z]+)(?: |$)", listed, re.MULTILINE)
    assert {"generate", "validate", "compare", "devices", "reference"} <= set(commands)
    for command in commands:
        start = f"  python -m mobile_runtime {command}"
        assert start in listed
        _, _, examples = helped(capsys, command).partition("examples:\n")
        lines = examples.split("\n\n")[0].rstrip().splitlines()
        assert lines
        for line in lines:
            assert line == start or line.startswith(f"{start} ")


def test_help_ends_with_examples_and_needs_no_bundle() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mobile_runtime", "generate", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.stdout.rstrip().splitlines()[-1].startswith("  python -m mobile_runtime")


def test_a_contact_sheet_shows_each_picture_unchanged() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(5)]
    sheet = contact_sheet(pictures, ["a caption"] * 5, columns=2, scale=3)
    large = [picture.repeat(3, axis=0).repeat(3, axis=1) for picture in pictures]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, large[0].shape)[:, :, 0]
    for picture in large:
        found = (windows[:, :, 0, 0] == picture[0, 0]).all(axis=-1)
        rows, columns = np.nonzero(found)
        hits = [(windows[y, x] == picture).all() for y, x in zip(rows, columns, strict=True)]
        assert sum(hits) == 1


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "picture.png", np.zeros((2, 2, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_told_with_the_pictures_path_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*fox\.png: No space left .*; free space"):
        write_png(tmp_path / "fox.png", np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
