"""A recipe's types, and the loader. Strict: every fault is found, and all are told at once.

A recipe file is YAML: first a comment with its purpose and the exact command, then the keys of
`Recipe`. What the command line changes passes through the same types.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import ComponentName
from recipes.faults import RecipeError, did_you_mean, validate
from recipes.palette_settings import PaletteSettings
from recipes.settings import (
    NEEDED_COMPONENTS,
    AdaptersSettings,
    DecoderSettings,
    DistillSettings,
    FinetuneSettings,
    FoldSettings,
    PruneSettings,
    QuantizeSettings,
    ResolutionSettings,
    Strict,
)
from recipes.strict_yaml import parse_yaml

FOLDER = Path(__file__).parent
RANDOM_ARCHITECTURES = ("sd_turbo", "sd21", "sd15")
MAX_RECIPE_BYTES = 1_000_000
SchedulerName = Literal[
    "ddim", "euler", "euler_ancestral", "lcm", "dpm_solver_pp_2m", "ddpm", "source"
]
Steps = Annotated[int, Field(ge=1, le=1000)]
Side = Annotated[int, Field(ge=8, le=8192)]


class Source(Strict):
    """Where the pipeline comes from."""

    model: str = Field(min_length=1, description="hub id, folder, file, embedded or random:ARCH")
    revision: str | None = Field(
        default=None, min_length=1, description="of a hub id: branch, tag, commit"
    )

    @field_validator("model")
    @classmethod
    def _known_architecture(cls, model: str) -> str:
        kind, _, architecture = model.partition(":")
        if kind == "random" and architecture not in RANDOM_ARCHITECTURES:
            raise ValueError(
                f"unknown architecture {architecture!r}; choose one of: "
                + ", ".join(f"random:{name}" for name in RANDOM_ARCHITECTURES)
            )
        return model

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        has_none = self.model == "embedded" or self.model.startswith("random:")
        if self.revision is not None and has_none:
            return [f"revision: goes with a hub id, and {self.model} has none; remove it"]
        return []


class Schedule(Strict):
    """The sampler that is compiled into the bundle's tables."""

    scheduler: SchedulerName = Field(default="source", description="source: the pipeline's own")
    steps: Steps = Field(default=25, description="the default number of steps")
    other_steps: tuple[Steps, ...] = Field(
        default=(), strict=False, description="further numbers of steps that get a table"
    )
    guidance_scale: float = Field(
        default=7.5, ge=0, le=100, description="1 or less: no guidance, one UNet call a step"
    )

    @property
    def every_steps(self) -> tuple[int, ...]:
        """Each number of steps that gets a table, the default one first."""
        return tuple(dict.fromkeys((self.steps, *self.other_steps)))

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if len(set(self.other_steps)) < len(self.other_steps):
            return ["other_steps: repeats a number; list each number once"]
        return []


class Stage(Strict):
    """One stage: a mapping with one key, the stage's name (see the table in stages.py)."""

    adapters: AdaptersSettings | None = None
    prune: PruneSettings | None = None
    resolution: ResolutionSettings | None = None
    distill: DistillSettings | None = None
    decoder: DecoderSettings | None = None
    finetune: FinetuneSettings | None = None
    fold: FoldSettings | None = None
    quantize: QuantizeSettings | None = None

    @model_validator(mode="after")
    def _one_key(self) -> "Stage":
        if len(self.model_fields_set) != 1 or self.settings is None:
            raise ValueError(
                f"a stage is a mapping with one key, of: {', '.join(type(self).model_fields)}"
            )
        return self

    @property
    def name(self) -> str:
        """The stage's name."""
        return next(iter(self.model_fields_set))

    @property
    def settings(self) -> Any:
        """The stage's settings, of the type that this class names for it."""
        return getattr(self, self.name)


class GateOverrides(Strict):
    """Figures that replace a target's own gates; null switches one off (manifest.Gates)."""

    # Every one is above zero: at 0 dB the error is as large as the signal.
    component_snr_db: float | None = Field(default=None, gt=0)
    float16_snr_db: float | None = Field(default=None, gt=0)
    layer_snr_db: float | None = Field(default=None, gt=0)
    trajectory_snr_db: float | None = Field(default=None, gt=0)
    picture_psnr_db: float | None = Field(default=None, gt=0)
    source_component_snr_db: float | None = Field(default=None, gt=0)
    source_picture_psnr_db: float | None = Field(default=None, gt=0)


class CoreMLOptions(Strict):
    """What only the Core ML converter reads."""

    deployment_target: Literal["iOS16", "iOS17", "iOS18"] = "iOS17"
    palettes: PaletteSettings | None = Field(
        default=None, description="weights as indices into tables; None: as the stages leave them"
    )

    def faults(self, components: Collection[str]) -> list[str]:
        """What does not fit together or the recipe's components, one sentence each."""
        if self.palettes is None:
            return []
        found = [f"palettes.{fault}" for fault in self.palettes.faults(self.deployment_target)]
        found += [
            f"palettes.components: {component} is not among the recipe's "
            f"components ({', '.join(components)}); add it there or remove it here"
            for component in self.palettes.components
            if component not in components
        ]
        return found


class OnnxOptions(Strict):
    """What only the ONNX converter reads."""

    opset: int = Field(default=18, ge=18, le=23)
    ort_format: bool = Field(
        default=False,
        description=".ort files instead of .onnx, and the operators they need; not for Optimum",
    )
    activations: Literal["int8", "uint8"] = Field(
        default="int8",
        description="where they are static: uint8 is several times as quick on x86 with VNNI, "
        "saturates on x86 without, and is alike on Arm; the values are the same",
    )


class ExecuTorchOptions(Strict):
    """What only the ExecuTorch converter reads: nothing yet."""


class Targets(Strict):
    """Options that one target alone has."""

    coreml: CoreMLOptions = CoreMLOptions()
    onnx: OnnxOptions = OnnxOptions()
    executorch: ExecuTorchOptions = ExecuTorchOptions()


# What these make of a pipeline computes what it computed; no other stage may change it afterwards.
PRESERVING = ("fold", "quantize")
REPEATABLE = ("prune", "distill")


def _order_faults(stages: tuple[Stage, ...]) -> list[str]:
    """What is wrong with the order of stages, one sentence each."""
    names = [stage.name for stage in stages]
    found = [
        f"{name} is listed twice; merge its settings"
        for name in sorted({name for name in names if names.count(name) > 1})
        if name not in REPEATABLE
    ]
    preserving = [name for name in names if name in PRESERVING]
    for index, name in enumerate(names):
        before = [earlier for earlier in names[:index] if earlier in PRESERVING]
        if name not in PRESERVING and before:
            found.append(
                f"{name} changes weights, so it cannot follow {before[0]}; list it before that"
            )
    for later in ("distill", "decoder"):
        if "resolution" in names and later in names[: names.index("resolution")]:
            found.append(f"resolution: its diffusion loss would undo {later}; list it before that")
    if "adapters" in names[1:]:
        found.append("adapters comes first: a LoRA fits the weights that it was trained for")
    if "finetune" in names and names[names.index("finetune") + 1 :] not in (
        ["quantize"],
        ["fold", "quantize"],
    ):
        found.append(
            "finetune tunes the UNet for the integers that quantize makes of it; list quantize "
            "right after it, with at most fold between them"
        )
    if preserving == ["quantize", "fold"]:
        found.append("fold cannot follow quantize, whose integers it would undo; list it before")
    return found


def _few_step_faults(stages: tuple[Stage, ...], schedule: Schedule) -> list[str]:
    """Where the schedule is not what the last distillation trained for."""
    trained = [stage.distill for stage in stages if stage.distill]
    if not trained:
        return []
    steps = trained[-1].steps
    found = []
    if schedule.every_steps != (steps,):
        asked = ", ".join(map(str, schedule.every_steps))
        found.append(
            f"schedule.steps: {asked}, and the distill stage trains for {steps}; give both the "
            "same number, and no other_steps"
        )
    if schedule.guidance_scale > 1:
        found.append(
            f"schedule.guidance_scale: {schedule.guidance_scale}, but distillation folds guidance "
            "in; set it to 0"
        )
    if schedule.scheduler != "source":
        found.append(
            f"schedule.scheduler: {schedule.scheduler}, but a distilled pipeline brings the "
            "scheduler that it was trained for; set it to source"
        )
    return found


def _pair(value: Any) -> Any:
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"{value!r} should be a whole number of pixels, or [height, width]")
    return tuple(sides)


Resolution = Annotated[
    tuple[Side, Side],
    BeforeValidator(_pair),
    PlainSerializer(lambda pair: pair[0] if pair[0] == pair[1] else list(pair)),
]


class Recipe(Strict):
    """How one pipeline becomes a bundle."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    source: Source
    resolution: Resolution = Field(description="picture side in pixels, or [height, width]")
    schedule: Schedule = Schedule()
    components: tuple[ComponentName, ...] = Field(
        default=NEEDED_COMPONENTS, strict=False, description="may add vae_encoder"
    )
    stages: tuple[Stage, ...] = Field(default=(), strict=False)
    precision: Literal["auto", "float32", "float16"] = Field(
        default="auto",
        description="what the target computes in; auto: float16 on Core ML, float32 elsewhere",
    )
    golden_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("a photo of an astronaut riding a horse on mars",),
        strict=False,
        min_length=1,
        description="the bundle holds a golden run of each, to be held against every runtime",
    )
    golden_seeds: int = Field(
        default=1, ge=1, le=1000, description="how many golden runs of each, from a seed of its own"
    )
    gates: GateOverrides = GateOverrides()
    targets: Targets = Targets()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        faults = [f"source.{fault}" for fault in self.source.faults()]
        faults += [f"schedule.{fault}" for fault in self.schedule.faults()]
        if len(set(self.components)) < len(self.components):
            faults.append("components: names one twice; list each component once")
        missing = [name for name in NEEDED_COMPONENTS if name not in self.components]
        if missing:
            needed = f"{', '.join(NEEDED_COMPONENTS[:-1])} and {NEEDED_COMPONENTS[-1]}"
            faults.append(f"components: needs {needed}; missing: {', '.join(missing)}")
        faults += [f"stages: {fault}" for fault in _order_faults(self.stages)]
        faults += _few_step_faults(self.stages, self.schedule)
        for index, stage in enumerate(self.stages):
            key = f"stages.{index}.{stage.name}"
            faults += [f"{key}.{fault}" for fault in stage.settings.faults()]
            quantized = stage.quantize.components if stage.quantize else ()
            faults += [
                f"{key}.components: {component} is not among the recipe's "
                f"components ({', '.join(self.components)}); add it there or remove it here"
                for component in quantized
                if component not in (*self.components, *missing)
            ]
        known = (*self.components, *missing)
        faults += [f"targets.coreml.{fault}" for fault in self.targets.coreml.faults(known)]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def height(self) -> int:
        """The picture's height in pixels."""
        return self.resolution[0]

    @property
    def width(self) -> int:
        """The picture's width in pixels."""
        return self.resolution[1]

    @property
    def guided(self) -> bool:
        """Whether each step calls the UNet on a pair: [negative prompt, prompt]."""
        return self.schedule.guidance_scale > 1

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with its defaults, as plain data that loads back to an equal recipe."""
        data = self.model_dump(mode="json")
        data["gates"] = self.gates.model_dump(exclude_unset=True)
        data["stages"] = [
            {stage.name: stage.settings.model_dump(mode="json")} for stage in self.stages
        ]
        return data

    def to_yaml(self) -> str:
        """`resolved()` as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=100)


def names() -> list[str]:
    """The recipes that the package ships."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name_or_path: str) -> Path:
    """The file of a recipe: a shipped one by its name, or any by its path."""
    if name_or_path in names():
        return FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.name != name_or_path:
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}; `python -m recipes list` shows names")
        return path
    hint = did_you_mean(name_or_path, names()).removesuffix("?")
    raise UserError(
        f"unknown recipe {name_or_path!r}{hint}; choose one of: {', '.join(names())}, "
        "or give the path of a .yaml file"
    )


def purpose(path: Path) -> str:
    """The first line of a recipe file's opening comment."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


# Stand in for a faulty value that has no default, so that the search for faults can go on.
_STAND_INS = {
    "name": "recipe",
    "source": {"model": "embedded"},
    "model": "embedded",
    "resolution": 512,
    "layers": "*",
    "bits": 4,
    "weights": "int8",
    "reason": "none",
}


def load(name_or_path: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe by name or path and check it with the overrides applied.

    overrides: dotted keys to values, e.g. {"schedule.steps": 4, "source.model": "embedded",
    "stages.quantize.activations": "int8_dynamic"}. Raises RecipeError with every fault.
    """
    path = find(name_or_path)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path} has more than {MAX_RECIPE_BYTES} bytes; is it a recipe?")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"not UTF-8 text: {error}"]) from None
    return parse(parse_yaml(text, str(path)), overrides or {}, where=f"recipe {name_or_path}")


def parse(data: Any, overrides: dict[str, Any] | None = None, where: str = "recipe") -> Recipe:
    """Check plain data (as YAML gives it) with overrides applied; RecipeError with every fault."""
    if not isinstance(data, dict):
        raise RecipeError(where, ["a recipe is a mapping of keys, e.g. `name: my_recipe`"])
    data = copy.deepcopy(data)
    faults = []
    overrides = overrides or {}
    if "source.model" in overrides and isinstance(data.get("source"), dict):
        # A revision belongs to the model that it was written for.
        data["source"].pop("revision", None)
    for key, value in overrides.items():
        fault = _override(data, key, value)
        if fault:
            faults.append(fault)
    recipe, more = validate(Recipe, data, _STAND_INS)
    if faults or more or recipe is None:
        raise RecipeError(where, faults + more)
    return recipe


def _override(data: dict[str, Any], dotted: str, value: Any) -> str | None:
    """Set one dotted key; inside a list a part is an index or the key of a one-key mapping."""
    here: Any = data
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        place: Any = part
        if isinstance(here, list):
            keyed = [i for i, item in enumerate(here) if isinstance(item, dict) and part in item]
            if part in map(str, range(len(here))):
                place = int(part)
            elif len(keyed) == 1 and not last:
                here, place = here[keyed[0]], part
            else:
                if len(keyed) > 1:
                    ways = " or ".join(".".join([*parts[:depth], str(i)]) for i in keyed)
                    return f"{dotted}: the list has {part} {len(keyed)} times; name one, as {ways}"
                known = [str(key) for item in here if isinstance(item, dict) for key in item]
                return f"{dotted}: the list has no entry {part!r}" + did_you_mean(part, known)
        elif not isinstance(here, dict):
            return f"{dotted}: {'.'.join(parts[:depth])} is a single value and has no keys"
        if last:
            here[place] = value
        elif isinstance(here, dict) and (place not in here or here[place] is None):
            here[place] = {}
        here = here[place]
    return None
