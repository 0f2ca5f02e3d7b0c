"""SD-Turbo's real size on two cores: `pytest -m full_size` (half an hour and 14 GB)."""

import json
from pathlib import Path

import pytest

from mobile_runtime.bundle import Bundle
from tests.benchmarks import full_size


@pytest.mark.full_size
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", full_size.TARGETS)
def test_sd_turbo_int8_converts_and_validates(tmp_path: Path, target: str) -> None:
    output = tmp_path / target
    row = full_size.measure(target, "sd_turbo_int8", "random:sd_turbo", output)
    assert row["exit_code"] == 0
    assert row["verdict"] == "pass"
    assert row["seconds"] <= full_size.LIMIT_S
    assert row["peak_bytes"] <= full_size.LIMIT_PEAK_BYTES
    assert row["share_of_fp32"] <= full_size.LIMIT_SHARE
    entry = Bundle.open(output, verify=False).component("unet")
    assert entry.parameters == 865_910_724
    report = json.loads((output / "report.json").read_text())
    assert report["verdict"] == "pass"
