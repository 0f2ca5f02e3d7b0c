"""A bundle's parity checks as tests, for a continuous integration of your own.

    pytest -p mobile_runtime.pytest_plugin --bundle=build/pocket_int8.onnx

runs, and shows as one test each, what `python -m mobile_runtime validate` checks: for every
component its outputs' form, both references, two runs on the same input, and the prompt's effect;
for every golden prompt the tokens, the noise, the latents and the picture. With onnxruntime by
default for an ONNX bundle; `--bundle-backend` names another. Gates are the bundle's own;
`--bundle-gate picture_psnr_db=35` sets another. Your own tests run beside them if you name them:

    pytest -p mobile_runtime.pytest_plugin --bundle=build/pocket_int8.onnx tests

A test's id begins with the bundle's folder; name it to run that test alone:

    pytest -p mobile_runtime.pytest_plugin --bundle=build/pocket_int8.onnx \\
        'pocket_int8.onnx::unet_outputs[onnxruntime]'

`--bundle-baseline FILE` adds one test a component, and one for the pipeline, that fails where
anything is worse than in the baseline that `validate --save-baseline FILE` stored: a figure in dB
that fell, a model that grew, a figure that is gone.

A gated check that fails, or that could not run, is a failed test. A figure that has no gate is
skipped with the figure as its reason. Each model runs once, when the first of its tests needs it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mobile_runtime import baseline, gates
from mobile_runtime.bundle import MANIFEST, Bundle
from mobile_runtime.checks import check_unseen, component_kinds
from mobile_runtime.errors import PocketError
from mobile_runtime.judge import judge_component, judge_prompts
from mobile_runtime.manifest import ComponentName
from mobile_runtime.pipeline_checks import prompt_kinds
from mobile_runtime.report import Check, Kind
from mobile_runtime.runs import Runtime
from mobile_runtime.validate import draw_here, run_here, runtimes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bundle, --bundle-backend, --bundle-gate and --bundle-baseline."""
    group = parser.getgroup("mobile_runtime")
    group.addoption("--bundle", metavar="DIR", help="check the parity of this bundle")
    group.addoption(
        "--bundle-backend", metavar="NAME", help="its runtime (default: the target's own)"
    )
    group.addoption(
        "--bundle-gate", metavar="NAME=DB", action="append", default=[], help=gates.HELP
    )
    group.addoption(
        "--bundle-baseline",
        metavar="FILE",
        help="fail where anything is worse than in this file of validate --save-baseline",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the bundle: alone, after the tests that were named, or its named tests."""
    folder = config.getoption("--bundle")
    if folder is None:
        return
    manifest = Path(folder, MANIFEST)
    if not manifest.is_file():
        raise pytest.UsageError(f"--bundle: {folder} is not a bundle: it has no {MANIFEST}")
    named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
    # The ids that pytest prints become paths, which is what it looks for.
    prefix, path = f"{_folder_name(manifest)}::", str(manifest.absolute())
    args = [
        f"{path}::{arg.removeprefix(prefix)}" if arg.startswith(prefix) else arg for arg in named
    ]
    config.args = args if args != named else [*named, path]


def _folder_name(manifest: Path) -> str:
    return manifest.resolve().parent.name


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "BundleFile | None":
    """Collect the manifest that --bundle names, and no other."""
    folder = parent.config.getoption("--bundle")
    if folder is None or file_path.resolve() != Path(folder, MANIFEST).resolve():
        return None
    name = _folder_name(file_path)
    # A bundle mostly lies outside pytest's root folder, and then has no id of its own.
    return BundleFile.from_parent(parent, path=file_path, name=name, nodeid=name)


class BundleFile(pytest.File):
    """A bundle's manifest: it yields one test a check."""

    def collect(self) -> Iterator[pytest.Item]:
        """The tests, known from the manifest alone; nothing runs yet."""
        try:
            asked = gates.parse_gates(self.config.getoption("--bundle-gate"))
            bundle = gates.with_gates(Bundle.open(self.path.parent), asked)
            chosen = runtimes(bundle, self.config.getoption("--bundle-backend"))
            before = self._baseline(bundle)
        except PocketError as error:
            raise self.CollectError(str(error)) from error
        groups: dict[str, list[CheckGroup]] = {}
        for entry in bundle.manifest.components:
            for runtime in chosen:
                group = CheckGroup(_component(bundle, entry.name, runtime))
                groups.setdefault(entry.name, []).append(group)
                for kind in component_kinds(bundle, entry.name, runtime):
                    name = f"{entry.name}_{kind}[{runtime.label}]"
                    yield CheckItem.from_parent(self, name=name, group=group, kind=kind)
        prompts = range(len(bundle.manifest.golden.prompts))
        last = chosen[-1].label
        group = CheckGroup(_pipeline(bundle, chosen[-1], prompts))
        groups["pipeline"] = [group]
        for prompt in prompts:
            for kind in prompt_kinds():
                name = f"pipeline_{kind}[{last}-prompt{prompt}]"
                yield CheckItem.from_parent(self, name=name, group=group, kind=kind, prompt=prompt)
        if not prompts:
            # The check that says that no picture was run.
            name = f"pipeline_outputs[{last}]"
            yield CheckItem.from_parent(self, name=name, group=group, kind="outputs")
        if before is None:
            return
        for place in before.places:
            group = CheckGroup(_compared(bundle, groups.get(place, []), before, place))
            name = f"{place}_baseline"
            yield CheckItem.from_parent(self, name=name, group=group, kind="baseline")

    def _baseline(self, bundle: Bundle) -> baseline.Baseline | None:
        named = self.config.getoption("--bundle-baseline")
        if named is None:
            return None
        before = baseline.read(Path(named))
        baseline.check_bundle(bundle, before)
        return before


def _quiet(text: str) -> None:
    """pytest tells the progress."""


def _component(bundle: Bundle, name: ComponentName, runtime: Runtime) -> Callable[[], list[Check]]:
    def checks() -> list[Check]:
        run = run_here(bundle, name, runtime, repeats=0, step=_quiet)
        found = judge_component(bundle, name, runtime, run).checks
        return found + check_unseen(bundle, name, runtime, found)

    return checks


def _pipeline(
    bundle: Bundle, runtime: Runtime, prompts: Sequence[int]
) -> Callable[[], list[Check]]:
    def checks() -> list[Check]:
        runs = draw_here(bundle, runtime, prompts, repeats=0, step=_quiet)
        return judge_prompts(bundle, runtime, runs).checks

    return checks


def _compared(
    bundle: Bundle, groups: Sequence["CheckGroup"], before: baseline.Baseline, place: str
) -> Callable[[], list[Check]]:
    def checks() -> list[Check]:
        now = tuple(check for group in groups for check in group.checks())
        found = baseline.compare(bundle, now, before)
        return [check for check in found if check.component == place]

    return checks


class CheckGroup:
    """The checks that one run gives; the run happens when the first of them is asked for."""

    def __init__(self, run: Callable[[], list[Check]]) -> None:
        self._run = run
        self._checks: list[Check] | None = None

    def checks(self) -> list[Check]:
        """All of them."""
        if self._checks is None:
            self._checks = self._run()
        return self._checks

    def find(self, kind: Kind, prompt: int | None) -> Check:
        """The check of a kind; where nothing could be run, the check that says so."""
        mine = [check for check in self.checks() if check.prompt in (prompt, None)]
        broken = [check for check in mine if check.kind == "outputs" and check.status != "pass"]
        return ([check for check in mine if check.kind == kind] or broken)[0]


class CheckFailedError(Exception):
    """A gated check that did not pass; its message is the check's reason."""


class CheckItem(pytest.Item):
    """One check as a test."""

    def __init__(
        self, *, group: CheckGroup, kind: Kind, prompt: int | None = None, **values: Any
    ) -> None:
        super().__init__(**values)
        self.group = group
        self.kind = kind
        self.prompt = prompt

    def runtest(self) -> None:
        """Pass, skip what has no gate, or fail."""
        check = self.group.find(self.kind, self.prompt)
        if check.status == "not_gated":
            pytest.skip(f"measured, not gated: {check.reason}")
        if not check.gated:
            pytest.skip(f"not run: {check.reason}")
        if check.status != "pass":
            raise CheckFailedError(f"{check.status}: {check.reason}")

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The reason alone: a traceback through this file would tell nothing."""
        if isinstance(excinfo.value, CheckFailedError | PocketError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the test comes from, and its name."""
        return self.path, None, self.name
