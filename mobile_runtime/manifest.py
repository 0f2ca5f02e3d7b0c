"""The types of `manifest.json`, schema 1: the one contract between converters and runtimes.

Every path is relative to the bundle's folder, uses `/`, and stays inside it. Every type refuses
keys that it does not know, so that a misspelt key is an error and not a silent default.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
)

SCHEMA_VERSION = 1

T = TypeVar("T", str, int)

Target = Literal["onnx", "coreml", "executorch"]
ComponentName = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder"]
DType = Literal["float32", "float16", "int32", "int64"]

# What the pipeline calls; a bundle may hold other components beside these.
PIPELINE_COMPONENTS: tuple[ComponentName, ...] = ("text_encoder", "unet", "vae_decoder")


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts or "\0" in path:
        raise ValueError(f"the path {path!r} points outside the bundle")
    return path


def _repeated(names: Sequence[T]) -> list[T]:
    return [name for name, count in Counter(names).items() if count > 1]


def _belongs(file: str, model: str) -> bool:
    """Whether a file is a model's: itself, one of a package, or external data beside it."""
    path, whole = PurePosixPath(file), PurePosixPath(model)
    beside = path.parent == whole.parent and path.name.startswith(whole.stem)
    return beside or whole in path.parents


RelativePath = Annotated[str, AfterValidator(_inside)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
SUFFIXES = {"onnx": ".onnx", "ort": ".ort", "mlpackage": ".mlpackage", "pte": ".pte"}
"""Of a model's path, by its format."""
LAYOUTS = {1: "N", 2: "NL", 3: "NLD", 4: "NCHW"}
"""Of a component's tensors, by their number of axes."""


class Strict(BaseModel):
    """A record that refuses unknown keys and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorSpec(Strict):
    """One named input or output of a component; shapes are static."""

    name: str
    shape: tuple[PositiveInt, ...] = Field(min_length=1)
    dtype: DType
    layout: str = Field(description="one letter an axis, e.g. NCHW; 'N' alone for a vector")
    range: tuple[float, float] | None = Field(
        default=None, description="usual value range, if bounded"
    )
    description: str

    @model_validator(mode="after")
    def _a_letter_an_axis(self) -> "TensorSpec":
        if len(self.layout) != len(self.shape):
            raise ValueError(f"the layout {self.layout!r} does not name {len(self.shape)} axes")
        return self


class AtConversion(Strict):
    """What a model gave on the machine that made it, where nobody can look at its inside."""

    snr_db: float = Field(description="the worst golden case's, against PyTorch after the stages")
    made_on: str = Field(description="the processor and the runtime (mobile_runtime/taps.py)")


class ComponentEntry(Strict):
    """One model of the bundle: its file, its tensors, and what it costs."""

    name: ComponentName
    path: RelativePath = Field(description="a file, or a folder for .mlpackage")
    format: Literal["onnx", "ort", "mlpackage", "pte"]
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    scheme: str = Field(description="float32, float16, w8, w8a8_dynamic, ...: what the file holds")
    parameters: NonNegativeInt
    macs: NonNegativeInt = Field(description="multiply-adds of one call")
    bytes: PositiveInt = Field(lt=2**63, description="the model's files, weights included")
    at_conversion: AtConversion | None = None
    details: dict[str, Any] = Field(
        default_factory=dict,
        description="what the target adds: opset, deployment target, delegate calls, ...",
    )

    @model_validator(mode="after")
    def _format_is_the_files(self) -> "ComponentEntry":
        if PurePosixPath(self.path).suffix != SUFFIXES[self.format]:
            raise ValueError(f"{self.path} is no file of the format {self.format}")
        return self


class LayerPlan(Strict):
    """What quantization decided for one layer, by its module path, and why."""

    layer: str = Field(description="e.g. unet.down_blocks.0.resnets.0.conv1")
    weights: Literal["int8", "float16", "float32", "int4", "palette"]
    activations: Literal["none", "int8_dynamic", "int8_static"] = "none"
    activation_scale: float | None = Field(
        default=None, description="int8_static: input = scale * (integer - zero point)"
    )
    activation_zero_point: int | None = None
    output_scale: float | None = Field(
        default=None, description="int8_static: of the output, whose integers the kernels write"
    )
    output_zero_point: int | None = None
    bits: int | None = Field(default=None, description="palette: of an index into its table")
    tables: int | None = Field(
        default=None, description="palette: how many, each for an equal share of axis 0"
    )
    block: PositiveInt | None = Field(
        default=None, description="int4: input channels that share a scale"
    )
    rank: NonNegativeInt | None = Field(
        default=None, description="int4: of the float branch whose output is added; 0: none"
    )
    reason: str


class ScheduleRow(Strict):
    """One step of a sampler, linear in its tensors (README: a schedule is data).

    model_in = input_scale * x; x0 = u * x + v * model_out;
    x_next = a * x + b * x0 + c * x0_previous + d * fresh_noise
    """

    timestep: float
    input_scale: float
    u: float
    v: float
    a: float
    b: float
    c: float
    d: float


class ScheduleTable(Strict):
    """A compiled scheduler for one number of steps; x starts as init_noise_sigma * noise."""

    scheduler: str = Field(description="the diffusers class it was compiled from")
    prediction_type: str
    steps: PositiveInt
    init_noise_sigma: float
    rows: tuple[ScheduleRow, ...]

    @model_validator(mode="after")
    def _one_row_a_step(self) -> "ScheduleTable":
        if len(self.rows) != self.steps:
            raise ValueError(f"a schedule of {self.steps} steps has {len(self.rows)} rows")
        return self


class TokenizerFiles(Strict):
    """A CLIP byte-pair tokenizer: its files and its special tokens."""

    vocab: RelativePath = "tokenizer/vocab.json"
    merges: RelativePath = "tokenizer/merges.txt"
    max_length: int = Field(ge=2, description="the begin and the end count")
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class Generation(Strict):
    """What the pipeline needs beside its models. Shapes: latents (1, C, h, w), picture H x W."""

    latent_channels: PositiveInt
    latent_height: PositiveInt
    latent_width: PositiveInt
    height: PositiveInt
    width: PositiveInt
    scaling_factor: float = Field(gt=0, description="the decoder gets latents / scaling_factor")
    guidance_scale: float = Field(description="1 or less: no guidance, one UNet call a step")
    default_steps: PositiveInt
    negative_prompt: str = ""


class GoldenPrompt(Strict):
    """One stored run of the whole pipeline; its tensors are in golden/pipeline.safetensors."""

    prompt: str
    negative_prompt: str = ""
    seed: int = Field(ge=0, lt=2**64)
    steps: PositiveInt
    guidance_scale: float

    @property
    def call(self) -> dict[str, Any]:
        """What a pipeline is called with beside the prompt and its noise."""
        return {
            "negative_prompt": self.negative_prompt,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }


class Golden(Strict):
    """Stored inputs and outputs (see mobile_runtime/bundle.py for the tensors' names)."""

    components: dict[ComponentName, RelativePath]
    cases: dict[ComponentName, NonNegativeInt]
    conditioning_pairs: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = Field(
        default=(), description="UNet cases equal but for the prompt: (with prompt, empty prompt)"
    )
    pipeline: RelativePath
    prompts: tuple[GoldenPrompt, ...]
    taps: dict[ComponentName, RelativePath] = Field(
        default={}, description="what is known of the values inside (mobile_runtime/taps.py)"
    )
    layers: dict[ComponentName, RelativePath] = Field(
        default={},
        description="what quantized layers give alone (mobile_runtime/layer_goldens.py)",
    )
    vocabulary: RelativePath | None = Field(
        default=None, description="every token's ids and embedding (mobile_runtime/vocabulary.py)"
    )
    timesteps: RelativePath | None = Field(
        default=None, description="what the UNet makes of every timestep (mobile_runtime/taps.py)"
    )

    @model_validator(mode="after")
    def _cases_are_there(self) -> "Golden":
        for name, count in self.cases.items():
            if count and name not in self.components:
                raise ValueError(f"{name} has {count} golden cases and no file of them")
        for pair in self.conditioning_pairs:
            if max(pair) >= self.cases.get("unet", 0):
                raise ValueError(f"the conditioning pair {pair} names a case that unet has not")
        return self


TRAJECTORY_SNR_DB = 10.0
"""Below it, latents have nothing to do with their reference."""

Gate = Annotated[float, Field(gt=0)]
"""At 0 dB the error is as large as the signal."""


class Gates(Strict):
    """The figures a bundle has to reach. None: measured and told, not gated."""

    component_snr_db: Gate | None = Field(description="each component, same-function reference")
    float16_snr_db: Gate | None = Field(
        default=None,
        description="each component in float16 arithmetic, same-function reference; "
        "component_snr_db is for float32",
    )
    layer_snr_db: Gate | None = Field(
        default=None,
        description="each quantized layer on the same inputs, where activations are quantized",
    )
    trajectory_snr_db: Gate | None = Field(
        default=TRAJECTORY_SNR_DB,
        description="the latents after each step, same-function reference",
    )
    picture_psnr_db: Gate | None = Field(description="whole pipeline, same-function reference")
    source_component_snr_db: Gate | None = Field(
        default=None, description="each component against the source pipeline before the stages"
    )
    source_picture_psnr_db: Gate | None = None


class FileEntry(Strict):
    """One file of the bundle, by its hash."""

    path: RelativePath
    bytes: int
    sha256: str


class Manifest(Strict):
    """`manifest.json`: everything an app needs to run the bundle and everything to check it."""

    schema_version: Literal[1] = 1
    name: str = Field(description="the recipe's name")
    target: Target
    arithmetic: Literal["float32", "float16"] = Field(description="what the models compute in")
    tool_versions: dict[str, str]
    source: dict[str, Any]
    recipe: dict[str, Any] = Field(description="the resolved recipe, as `recipes show` prints it")
    stages: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = Field(
        default=(), description="what the support table changed for the target"
    )
    components: tuple[ComponentEntry, ...]
    tokenizer: TokenizerFiles
    generation: Generation
    schedules: tuple[ScheduleTable, ...]
    quantization: tuple[LayerPlan, ...] = ()
    golden: Golden
    gates: Gates
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _parts_fit(self) -> "Manifest":
        names = [entry.name for entry in self.components]
        paths = [entry.path for entry in self.files]
        faults = [f"there is no {name}" for name in PIPELINE_COMPONENTS if name not in names]
        faults += [f"the component {name} is listed twice" for name in _repeated(names)]
        faults += [f"the file {path} is listed twice" for path in _repeated(paths)]
        faults += self._faults_of_sizes() + self._faults_of_layouts()
        faults += self._faults_of_schedules() + self._faults_of_gates()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_sizes(self) -> list[str]:
        """A component has the bytes of its files."""
        faults = []
        for entry in self.components:
            sizes = [file.bytes for file in self.files if _belongs(file.path, entry.path)]
            # A model without files is told where they are opened.
            if sizes and (size := sum(sizes)) != entry.bytes:
                faults.append(
                    f"the component {entry.name} has {entry.bytes} bytes, and its files have {size}"
                )
        return faults

    def _faults_of_layouts(self) -> list[str]:
        """An app fills its tensors by their layout's letters, in this order."""
        return [
            f"{entry.name} has {spec.name} in the layout {spec.layout!r}, and there is "
            f"{LAYOUTS[len(spec.shape)]} for {len(spec.shape)} axes"
            for entry in self.components
            for spec in (*entry.inputs, *entry.outputs)
            if LAYOUTS.get(len(spec.shape), spec.layout) != spec.layout
        ]

    def _faults_of_schedules(self) -> list[str]:
        """One table a number of steps, and golden prompts for what an app does by default."""
        own = self.generation
        steps = [table.steps for table in self.schedules]
        faults = [f"there are two schedules of {count} steps" for count in _repeated(steps)]
        wanted = [own.default_steps, *(prompt.steps for prompt in self.golden.prompts)]
        faults += [
            f"there is no schedule of {count} steps"
            for count in dict.fromkeys(wanted)
            if count not in steps
        ]
        default = (own.default_steps, own.guidance_scale, own.negative_prompt)
        if self.golden.prompts and default not in [
            (prompt.steps, prompt.guidance_scale, prompt.negative_prompt)
            for prompt in self.golden.prompts
        ]:
            faults.append(
                f"no golden prompt is drawn as an app draws by default, in {own.default_steps} "
                f"steps with guidance {own.guidance_scale:g}"
            )
        return faults

    def _faults_of_gates(self) -> list[str]:
        """Models in float16 have a gate of their own, unless the recipe switches it off."""
        off = "float16_snr_db" in (self.recipe.get("gates") or {})
        if self.arithmetic == "float32" or self.gates.float16_snr_db is not None or off:
            return []
        return ["its models compute in float16, and there is no gate float16_snr_db"]

    def component(self, name: str) -> ComponentEntry | None:
        """The entry of one component, or None."""
        return next((entry for entry in self.components if entry.name == name), None)

    def schedule(self, steps: int) -> ScheduleTable | None:
        """The compiled table for a number of steps, or None."""
        return next((table for table in self.schedules if table.steps == steps), None)
