"""The report: its verdict, its files, and the bundle that it belongs to."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.latency import environment
from mobile_runtime.report import (
    Check,
    Pictures,
    Report,
    conclude,
    format_table,
    read_report,
    write_report,
)
from tests.bundles import make_bundle


def check(**values: Any) -> Check:
    defaults: dict[str, Any] = {
        "kind": "outputs",
        "component": "unet",
        "runtime": "onnxruntime",
        "status": "pass",
        "gated": True,
        "reason": "fine",
    }
    return Check(**defaults | values)


def report(*checks: Check, manifest_sha256: str = "0" * 64, **values: Any) -> Report:
    verdict, summary = conclude(checks)
    return Report(
        verdict=verdict,
        summary=summary,
        bundle="tiny",
        target="onnx",
        manifest_sha256=manifest_sha256,
        created="2026-01-01T00:00:00+00:00",
        environment=environment(),
        checks=checks,
        **values,
    )


def test_a_bundle_passes_when_every_gated_check_passed() -> None:
    assert conclude((check(), check(kind="repeat")))[0] == "pass"


def test_nothing_checked_is_not_a_pass() -> None:
    assert conclude(())[0] == "not_run"


def test_a_bundle_whose_models_never_ran_does_not_pass() -> None:
    assert conclude((check(kind="tokens", component="pipeline"),))[0] == "not_run"


def test_one_failed_check_fails_the_bundle_and_the_first_is_named() -> None:
    verdict, summary = conclude(
        (
            check(component="text_encoder"),
            check(component="unet", status="fail", reason="it is all NaN"),
            check(component="vae_decoder", status="fail", reason="something else"),
        )
    )
    assert verdict == "fail"
    assert "unet" in summary
    assert "it is all NaN" in summary
    assert "vae_decoder" not in summary


def test_a_gated_check_that_could_not_run_never_counts_as_passed() -> None:
    verdict, summary = conclude((check(), check(status="not_run", reason="no library")))
    assert verdict == "not_run"
    assert "no library" in summary


def test_what_only_another_machine_can_check_is_told_and_does_not_decide() -> None:
    elsewhere = check(kind="elsewhere", status="not_run", gated=False, reason="needs a Mac")
    assert conclude((check(), elsewhere))[0] == "pass"
    assert conclude((elsewhere,))[0] == "not_run"


def test_a_pass_names_what_was_measured_without_a_gate() -> None:
    ungated = {"status": "not_gated", "gated": False}
    verdict, summary = conclude(
        (
            check(),
            check(kind="same_function", component="vae_decoder"),
            check(kind="same_function", **ungated),
            check(kind="source", **ungated),
            check(kind="trajectory", component="pipeline", **ungated),
        )
    )
    assert verdict == "pass"
    wanted = "; not gated: same function of unet in onnxruntime, source, trajectory"
    assert summary.endswith(wanted)


def test_a_pass_with_every_gate_set_names_no_missing_one() -> None:
    assert "not gated" not in conclude((check(), check(kind="same_function")))[1]


STATUSES = st.sampled_from(["pass", "fail", "not_run", "not_gated"])


@settings(deadline=None)  # a busy machine is no reason to fail
@given(st.lists(st.tuples(STATUSES, st.booleans()), max_size=6))
def test_the_verdict_is_pass_only_if_no_gated_check_did_anything_else(
    statuses: list[tuple[str, bool]],
) -> None:
    checks = tuple(check(status=status, gated=gated) for status, gated in statuses)
    passed = [status == "pass" for status, gated in statuses if gated]
    assert (conclude(checks)[0] == "pass") == (bool(passed) and all(passed))


def test_the_table_names_the_failed_and_what_was_not_run() -> None:
    text = format_table(
        report(
            check(status="fail", reason="it is all NaN"),
            check(kind="elsewhere", status="not_run", gated=False, reason="Core ML needs a Mac"),
        )
    )
    assert "it is all NaN" in text
    assert "Core ML needs a Mac" in text
    assert text.splitlines()[-1].startswith("FAIL: ")


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    written = report(
        check(value=71.5, unit="dB", gate=60.0, details={"cases": [{"snr_db": 71.5}]}),
        check(kind="picture", component="pipeline"),
        manifest_sha256=bundle.manifest_sha256,
    )
    write_report(written, bundle.path)
    assert read_report(bundle) == written
    data = json.loads((bundle.path / "report.json").read_text())
    assert data["schema_version"] == 2
    assert data["manifest_sha256"] == bundle.manifest_sha256


def test_a_report_of_another_bundle_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    checks = (check(), check(kind="picture", component="pipeline"))
    write_report(report(*checks, manifest_sha256=bundle.manifest_sha256), bundle.path)
    other = make_bundle(tmp_path / "bundle", guidance_scale=4.0, force=True)
    write_report(report(*checks, manifest_sha256=bundle.manifest_sha256), other.path)
    with pytest.raises(BundleError, match="another bundle"):
        read_report(other)


def test_a_bundle_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mobile_runtime validate"):
        read_report(make_bundle(tmp_path / "bundle"))


def test_a_damaged_report_is_told(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle.path / "report.json").write_text('{"verdict": "pass"}')
    with pytest.raises(BundleError, match="not a valid report"):
        read_report(bundle)


def test_writing_leaves_the_bundle_valid_and_no_temporary_files(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    before = {path.name for path in bundle.path.iterdir()}
    write_report(report(check()), bundle.path)
    write_report(report(check()), bundle.path)
    assert {path.name for path in bundle.path.iterdir()} - before == {"report.json", "report.html"}
    type(bundle).open(bundle.path)


def test_a_report_that_cannot_be_written_is_a_user_error_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(report(check()), tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match="--output"):
        write_report(report(check(status="fail")), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


class Page(HTMLParser):
    """The elements and links of a page; every element has to be closed in order."""

    VOID = frozenset({"meta", "img", "br", "wbr", "!doctype"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(shown: Report, folder: Path) -> tuple[str, Page]:
    _, path = write_report(shown, folder)
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    return text, page


def pictures(prompt: str = "a red fox") -> Pictures:
    rng = np.random.default_rng(0)
    source, reference, output = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return Pictures(
        seed=0,
        prompt=prompt,
        runtime="onnxruntime",
        source=source,
        reference=reference,
        output=output,
    )


def test_the_page_needs_no_network_and_no_script_and_shows_four_pictures(tmp_path: Path) -> None:
    text, page = page_of(report(check(), pictures=(pictures(),)), tmp_path)
    assert len(page.links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_says_the_verdict_before_anything_else(tmp_path: Path) -> None:
    text, _ = page_of(
        report(check(status="fail", reason="it is all NaN"), pictures=(pictures(),)), tmp_path
    )
    places = [text.index(part) for part in ("<h1>", "Fail</span>", "it is all NaN", "<img")]
    assert all(a < b for a, b in pairwise(places))


def test_the_page_escapes_what_users_write(tmp_path: Path) -> None:
    attack = '<script>alert("1")</script>'
    text, page = page_of(report(check(reason=attack), pictures=(pictures(attack),)), tmp_path)
    assert attack not in text
    assert "script" not in page.tags
