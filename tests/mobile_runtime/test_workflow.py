"""The GitHub Actions workflow runs commands that exist, with arguments that they take."""

import importlib.util
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/parity.yml"
WORKFLOW_DATA: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def commands() -> list[list[str]]:
    """Every command of every job, its variables filled in."""
    found = []
    for job in WORKFLOW_DATA["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                for name, value in job.get("env", {}).items():
                    line = line.replace(f"${name}", value)
                found.append(shlex.split(line))
    return found


COMMANDS = commands()


def test_the_workflow_runs_on_pushes_and_pull_requests_and_its_jobs_are_whole() -> None:
    triggers = WORKFLOW_DATA[True]  # YAML 1.1 reads the key `on` as true
    assert {"push", "pull_request"} <= triggers.keys()
    for job in WORKFLOW_DATA["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "@v" in step.get("uses", "@v")


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_every_command_is_a_module_that_exists(command: list[str]) -> None:
    assert command[:2] == ["python", "-m"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setuptools warns whoever looks for pip after distutils
        assert importlib.util.find_spec(command[2]) is not None


def arguments_of(module: str) -> list[list[str]]:
    return [command[3:] for command in COMMANDS if command[2] == module]


def test_the_installation_names_files_and_an_extra_that_exist() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for arguments in arguments_of("pip"):
        assert arguments == ["install", "-c", "constraints.txt", "-e", ".[dev]"]
        assert "dev" in project["optional-dependencies"]
        assert (ROOT / "constraints.txt").is_file()


def test_the_conversion_takes_its_arguments_and_knows_its_recipe() -> None:
    from converters.cli import parser_for
    from recipes import schema

    (arguments,) = arguments_of("converters.onnx")
    parsed = parser_for("onnx").parse_args(arguments)
    assert schema.load(parsed.recipe, {}).name == "pocket_int8"


def test_the_validation_and_the_parity_tests_take_their_arguments() -> None:
    import argparse

    from mobile_runtime import pytest_plugin, validate

    (arguments,) = arguments_of("mobile_runtime")
    assert arguments.pop(0) == "validate"
    parser = argparse.ArgumentParser()
    validate.add_arguments(parser)
    bundle = parser.parse_args(arguments).bundle

    parity, suite = arguments_of("pytest")
    assert suite == []
    known = pytest.Parser(_ispytest=True)
    pytest_plugin.pytest_addoption(known)
    assert parity[:2] == ["-p", pytest_plugin.__name__]
    options, unknown = known.parse_known_and_unknown_args(parity[2:])
    assert os.fspath(options.bundle) == bundle
    assert options.bundle_backend == "onnxruntime"
    assert unknown == []
