"""What tests of stages share."""

from pathlib import Path

import pytest


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\na tent\n\na stone\n")
    return path
