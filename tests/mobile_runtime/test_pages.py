"""The report's page and the comparison's, in a real browser: a phone and a desktop, light and dark.

The pages are as full as they get: a failure with the values inside, a long plan, long names, a
device with the longest time, and one that never answered.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mobile_runtime import report_markdown
from mobile_runtime.__main__ import main
from mobile_runtime.errors import run_cli
from mobile_runtime.manifest import LayerPlan
from mobile_runtime.report import Check, DeviceRun, Pictures, Report, with_checks, write_report
from mobile_runtime.report_html import render
from mobile_runtime.validate import validate
from tests.browser import Scheme, chromium, look
from tests.bundles import make_bundle

PHONE, DESKTOP = 390, 1280
MAX_BYTES = 3_000_000
SILENT = "folder:../results-of-a-phone"
LAYER = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
in_a_browser = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    bundle = make_bundle(tmp_path_factory.mktemp("pages") / "bundle")
    report = validate(bundle, repeats=3, progress=False)
    inside = Check(
        kind="inside",
        component="unet",
        runtime="onnxruntime",
        status="fail",
        gated=True,
        reason=f"the first layer that diverges is {LAYER} (linear): 0.2 dB against PyTorch",
        details={
            "layer": LAYER,
            "snr_db": [120.0 - k % 40 for k in range(700)],
            "snr_db_at_conversion": [130.0] * 700,
        },
    )
    plans = tuple(
        LayerPlan(
            layer=f"{LAYER}.{k}",
            weights="int8",
            activations="none",
            reason=f"sensitivity {20 + k / 10:.1f} dB: planned by a byte budget",
        )
        for k in range(400)
    )
    device = DeviceRun(
        name="ssh:a-rather-long-name.of.a.host.example.org",
        model="A phone of some make",
        emulated=True,
        memory_bytes=8 * 10**9,
        environment=report.environment,
    )
    silent = Check(
        kind="outputs",
        component="unet",
        runtime=f"onnxruntime on {SILENT}",
        status="not_run",
        gated=True,
        reason="it did not answer",
    )
    answered = silent.model_copy(
        update={"runtime": f"onnxruntime on {device.name}", "status": "pass"}
    )
    unet = next(row for row in report.latency if row.component == "unet")
    slow = unet.model_copy(
        update={
            "runtime": answered.runtime,
            "median_ms": 1e9,
            "p90_ms": 1e9,
            "peak_bytes": 2**62,
        }
    )
    full = with_checks(report, [inside, answered, silent])
    return full.model_copy(
        update={
            "bundle": "pocket_turbo_of_some_recipe_w8a8",
            "quantization": plans,
            "devices": (device,),
            "latency": (*report.latency, slow),
            "asked_gates": {"picture_psnr_db": 99.5},
        }
    )


@pytest.fixture(scope="module")
def pages(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    _, page = write_report(report, folder)
    comparison = folder / "compare.html"
    argv = ["compare", *[str(folder)] * 4, "-o", str(comparison)]
    assert run_cli(main, argv) == 0
    return {"report": page, "compare": comparison}


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fits_and_can_be_read(
    pages: dict[str, Path], name: str, width: int, scheme: Scheme, tmp_path: Path
) -> None:
    found = look(pages[name], width, scheme, tmp_path)
    assert found["width"] == width
    assert found["page"] <= width
    for fault in ("wide", "cut", "faint", "broken", "thin"):
        assert found[fault] == [], fault
    assert found["scrolls"] == 0
    assert (found["background"] < 0.1) == (scheme == "dark")
    assert found["screenshot"].stat().st_size > 20_000


def test_a_page_is_one_small_file_that_needs_nothing_else(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert len(text.encode()) < MAX_BYTES
        assert "<script" not in text
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text


def test_large_pictures_and_many_of_them_keep_the_page_small(report: Report) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)  # noise: the worst to compress
    shown = Pictures(
        prompt="noise", seed=0, runtime="r", source=picture, reference=picture, output=picture
    )
    many = tuple(shown.model_copy(update={"seed": seed}) for seed in range(40))
    page = render(report.model_copy(update={"pictures": many}))
    assert len(page.encode()) < MAX_BYTES
    assert "seed 0" in page
    assert "more are in the table below, without pictures" in page


def test_a_failures_place_stands_on_top(report: Report, pages: dict[str, Path]) -> None:
    text = pages["report"].read_text(encoding="utf-8")
    assert report.verdict == "fail"
    assert LAYER in report.summary
    assert text.index("Where it goes wrong") < text.index("Golden pictures")


def test_a_comparison_tells_each_report(report, pages, tmp_path, capsys):
    folder = str(pages["report"].parent)
    argv = ["compare", folder, f"{folder}/report.json", "-o", str(tmp_path / "new" / "page.html")]
    assert run_cli(main, [*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    assert rows[:3] == rows[3:]
    assert rows[0]["verdict"] == "fail"
    assert set(rows[0]["median_ms"]) == {"text_encoder", "unet", "vae_decoder", "pipeline"}
    assert run_cli(main, argv) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_device_that_never_answered_is_given_no_processor(report, pages, tmp_path, capsys):
    folder = str(pages["report"].parent)
    assert run_cli(main, ["compare", folder, "-o", str(tmp_path / "page.html"), "--json"]) == 0
    runtimes = [row["runtime"] for row in json.loads(capsys.readouterr().out)]
    assert runtimes == [
        f"onnxruntime, {report.environment.cpu}",
        f"onnxruntime on {report.devices[0].name}, A phone of some make, emulated",
        f"onnxruntime on {SILENT}",
    ]


def test_the_longest_time_is_told_in_few_letters(report, pages, tmp_path, capsys):
    argv = ["compare", str(pages["report"].parent), "-o", str(tmp_path / "page.html")]
    assert run_cli(main, argv) == 0
    texts = [page.read_text(encoding="utf-8") for page in pages.values()]
    for text in (*texts, capsys.readouterr().out, report_markdown.render(report)):
        assert not re.search(r"\d{20}", re.sub(r'"data:[^"]*"|[0-9a-f]{64}', "", text))
    assert all("1.0e+09 ms" in text for text in texts)


def test_a_failed_baseline_is_the_comparisons_verdict_too(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    report = validate(bundle, repeats=0, prompts=1, progress=False)
    assert report.verdict == "pass"
    worse = Check(
        kind="baseline", component="unet", runtime="baseline", status="fail", gated=True, reason="x"
    )
    write_report(with_checks(report, [worse]), tmp_path / "worse")
    argv = ["compare", str(tmp_path / "worse"), "--json", "-o", str(tmp_path / "page.html")]
    assert run_cli(main, argv) == 0
    assert [row["verdict"] for row in json.loads(capsys.readouterr().out)] == ["fail"]
    empty = report.model_copy(update={"checks": (), "verdict": "not_run"})
    write_report(empty, tmp_path / "empty")
    argv = ["compare", str(tmp_path / "empty"), "-o", str(tmp_path / "other.html")]
    assert run_cli(main, argv) == 2
    assert "no model that was run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none", None, "does not exist"),
        ("report.json", "{}", "is not a valid report"),
        ("report.json", "no JSON", "is not a valid report"),
        ("folder/other", "", "holds no report.json"),
        ("folder/manifest.json", "{}", "has not been validated"),
    ],
)
def test_what_is_no_report_is_said_in_one_sentence(tmp_path, capsys, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    asked = path.parent if "/" in name else path
    assert run_cli(main, ["compare", str(asked), "-o", str(tmp_path / "page.html")]) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert sentence in told
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_no_page_is_refused(pages, tmp_path, capsys):
    argv = ["compare", str(pages["report"]).replace(".html", ".json"), "-o"]
    assert run_cli(main, [*argv, str(tmp_path / "page.pdf")]) == 2
    assert "no .html file" in capsys.readouterr().err
