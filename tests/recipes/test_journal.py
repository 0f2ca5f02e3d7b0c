"""What takes long to measure is kept figure by figure, so that a killed run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from converters import palette_bits
from converters.palette_bits import Choice, Options
from recipes import importance, schema, stages
from recipes.journal import digest_of, journal
from recipes.sensitivity import Reference
from tests.converters.small import make_small_pipeline


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Killed(BaseException):
    """As Ctrl-C."""


def dying(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: int | None) -> list[int]:
    """Count the calls of a function; None: it lives on."""
    own, calls = getattr(where, name), list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        if after is not None and len(calls) == after:
            raise Killed
        calls.append(1)
        return own(*args, **options)

    monkeypatch.setattr(where, name, counted)
    return calls


def test_only_what_is_missing_is_measured(cache: Path) -> None:
    asked: list[str] = []

    def measured(key: str) -> Any:
        asked.append(key)
        if key == "c" and asked.count("c") == 1:
            raise Killed
        return {"of": key}

    def run() -> list[Any]:
        with journal("figures", "0" * 64) as figure:
            return [figure(key, lambda key=key: measured(key)) for key in "abcd"]

    with pytest.raises(Killed):
        run()
    (path,) = cache.iterdir()
    with path.open("a") as stream:
        stream.write('["d", {"of"')  # the line that was being written
    assert run() == [{"of": key} for key in "abcd"]
    assert "".join(asked) == "abccd"
    assert list(cache.iterdir()) == []


def test_where_nothing_can_be_written_everything_is_measured(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with journal("figures", "0" * 64) as figure:
        assert figure("a", lambda: 1) == 1


def test_a_digest_is_of_types_shapes_and_values() -> None:
    one = torch.zeros(2, 3)
    others = [one.half(), one.view(3, 2), one + 1, one.bfloat16()]
    assert len({digest_of([tensor]) for tensor in [one, *others]}) == 5
    assert digest_of([one]) == digest_of([one.clone()])
    assert digest_of("a") != digest_of("b")


@pytest.fixture
def recipe(tmp_path: Path) -> schema.Recipe:
    (tmp_path / "prompts.txt").write_text("a red tent\na hat\n")
    calibration = {"prompts": str(tmp_path / "prompts.txt"), "samples": 2}
    keep = {"min_snr_db": 40.0, "samples": 1}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 16,
            "schedule": {"steps": 2, "guidance_scale": 1.0},
            "stages": [
                {
                    "quantize": {
                        "activations": "int8_static",
                        "calibration": calibration,
                        "keep": keep,
                        "components": ["unet"],
                    }
                }
            ],
            "golden_prompts": ["a red tent"],
        }
    )


def test_a_sensitivity_pass_goes_on_where_it_was_killed(
    recipe: schema.Recipe, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def plans() -> list[Any]:
        return stages.apply(make_small_pipeline(), recipe).plans

    with monkeypatch.context() as patch:
        all_calls = dying(patch, Reference, "snr_db", None)
        wanted = plans()
    with monkeypatch.context() as patch:
        dying(patch, Reference, "snr_db", 7)
        with pytest.raises(Killed):
            plans()
    assert len(list(cache.glob("sensitivity-*.jsonl"))) == 1
    with monkeypatch.context() as patch:
        calls = dying(patch, Reference, "snr_db", None)
        assert plans() == wanted
    assert len(calls) == len(all_calls) - 7
    assert not list(cache.glob("sensitivity-*"))


PERCENTILE = {"observer": "percentile", "percentile": 90.0, "samples": 2}


@pytest.mark.parametrize(
    ("killed", "then"),
    [
        ({}, {"calibration": PERCENTILE}),
        ({"activations": "int8_dynamic"}, {"activations": "none"}),
    ],
    ids=["observer", "activations"],
)
def test_a_killed_pass_lends_nothing_to_one_with_other_scales(
    recipe: schema.Recipe,
    killed: dict[str, Any],
    then: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    def run(changes: dict[str, Any]) -> list[Any]:
        data = recipe.resolved()
        own = data["stages"][0]["quantize"]
        usual = {"samples": 2, "prompts": own["calibration"]["prompts"]}
        own |= {"activations": "int8_static", **changes}
        own["calibration"] = usual | changes.get("calibration", {})
        if own["activations"] != "int8_static":
            del own["calibration"]
        return stages.apply(make_small_pipeline(), schema.parse(data)).plans

    wanted = run(then)
    with monkeypatch.context() as patch:
        dying(patch, Reference, "snr_db", 20)
        with pytest.raises(Killed):
            run(killed)
    assert list(cache.glob("sensitivity-*.jsonl"))
    assert run(then) == wanted


def test_taylor_goes_on_with_the_picture_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red tent\na hat\nice\n")
    channels = {"macs": 0.1, "importance": "taylor", "samples": 4}
    recipe = schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 16,
            "schedule": {"steps": 2, "guidance_scale": 1.0},
            "stages": [
                {"prune": {"channels": {**channels, "prompts": str(tmp_path / "prompts.txt")}}}
            ],
        }
    )

    def matters() -> dict[str, torch.Tensor]:
        pipeline = make_small_pipeline()
        return importance.taylor(pipeline.unet, pipeline, recipe.stages[0].prune.channels, recipe)

    wanted = matters()
    with monkeypatch.context() as patch:
        dying(patch, importance._Watched, "__call__", 5)  # in the third picture
        with pytest.raises(Killed):
            matters()
    with monkeypatch.context() as patch:
        calls = dying(patch, importance._Watched, "__call__", None)
        found = matters()
    assert len(calls) == 4
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    assert list(cache.iterdir()) == []


def test_palettes_go_on_with_the_width_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {f"unet.{k}": torch.nn.Linear(8, 8).requires_grad_(False) for k in range(3)}
    choices = tuple(Choice(bits, 64 * bits) for bits in (2, 4))
    options = {path: Options(choices, "a test", 1) for path in layers}
    modules = {"unet": list(layers.values())}

    class Seen:
        args = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)
        kwargs: dict[str, Any] = {}  # noqa: RUF012

    def noises() -> Any:
        return palette_bits.noises(layers, options, Reference(modules, {"unet": [Seen]}))

    weights = [layer.weight for layer in layers.values()]
    wanted = noises()
    with monkeypatch.context() as patch:
        dying(patch, Reference, "snr_db", 4)
        with pytest.raises(Killed):
            noises()
    assert all(a is b.weight for a, b in zip(weights, layers.values(), strict=True))
    with monkeypatch.context() as patch:
        calls = dying(patch, Reference, "snr_db", None)
        assert noises() == wanted
    assert len(calls) == 2
