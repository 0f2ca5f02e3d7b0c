"""`python -m recipes` lists, shows and checks recipes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mobile_runtime.errors import run_cli
from recipes import schema
from recipes.__main__ import main


def run(*argv: str) -> int:
    return run_cli(main, list(argv))


def test_list_tells_every_recipe_and_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == schema.names()
    assert all(len(line.split()) > 4 for line in lines)


def test_show_prints_a_whole_recipe_that_loads_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("show", "pocket_int8", "--steps", "7", "--set", "gates.picture_psnr_db=50.0") == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    recipe = schema.load(str(path))
    assert recipe.schedule.steps == 7
    assert recipe == schema.load(
        "pocket_int8", {"schedule.steps": 7, "gates.picture_psnr_db": 50.0}
    )


def test_every_option_changes_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model a/b --revision 1234 --resolution [64,128] --steps 3 --guidance 1.5"
    assert run("show", "sd15_int8", *options.split()) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["source"] == {"model": "a/b", "revision": "1234"}
    assert shown["resolution"] == [64, 128]
    assert shown["schedule"]["steps"] == 3
    assert shown["schedule"]["guidance_scale"] == 1.5


def test_check_says_what_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "pocket_int8") == 0
    told = capsys.readouterr().out
    assert "is fine" in told
    assert "the recipe alone was checked" in told
    assert "--dry-run" in told


def test_faults_of_several_options_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "pocket_int8", "--steps", "[1", "--set", "a=[1", "--set", "b") == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("--steps: not valid", "--set a: not valid", "--set b:"))


def test_check_tells_all_faults_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsource: {model: embedded}\nresolutoin: 64\nprecision: half\n")
    assert run("check", str(path), "--steps", "none") == 2
    told = capsys.readouterr().err
    assert "resolutoin" in told
    assert "precision" in told
    assert "schedule.steps" in told
    assert "resolution: is missing" in told


@pytest.mark.parametrize(
    "argv",
    [
        ("show", "nothing"),
        ("check", "missing.yaml"),
        ("check", "pocket_int8", "--set", "novalue"),
        ("check", "pocket_int8", "--set", "a=[1"),
        ("check", "pocket_int8", "--set", ".=1"),
        ("check", "pocket_int8", "--set", "stages.\u00b2.quantize.weights=int8"),
        ("check", "pocket_int8", "--set", f"stages.{'9' * 5000}.quantize.weights=int8"),
        ("check", "pocket_int8", "--steps", "3", "--set", "schedule.steps=4"),
        ("check", "pocket_int8", "--resolution", "64px"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_help_ends_with_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    examples = text.split("examples:")[1].strip().splitlines()
    assert len(examples) >= 3
    for example in examples:
        argv = example.split()[3:]
        if argv[0] == "check":
            argv = ["check", "pocket_int8"]
        assert run(*argv) == 0


def test_looking_at_recipes_needs_no_torch() -> None:
    code = (
        "import sys; from recipes.__main__ import main; main(['list']); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
