"""The settings of each stage, strict. What a stage does with them is in the module of its name."""

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mobile_runtime.manifest import ComponentName
from recipes.faults import did_you_mean

# Without these there is no picture, and no golden run of the pipeline.
NEEDED_COMPONENTS: tuple[ComponentName, ...] = ("text_encoder", "unet", "vae_decoder")

Activations = Literal["none", "int8_dynamic", "int8_static"]


class Strict(BaseModel):
    """A part of a recipe: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Settings(Strict):
    """What the settings of every stage have."""

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each, beginning with the key."""
        return []


class Lora(Strict):
    """One LoRA file, and how much of it."""

    model: str = Field(min_length=1, description=".safetensors file, folder, or hub id")
    revision: str | None = Field(default=None, min_length=1, description="of a hub id")
    weight_name: str | None = Field(
        default=None, min_length=1, description="the file, where the folder or hub id has several"
    )
    scale: float = Field(default=1.0, ge=-10, le=10)


class AdaptersSettings(Settings):
    """LoRA weights that are added into the weights of the UNet and the text encoder."""

    loras: tuple[Lora, ...] = Field(strict=False, min_length=1)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class ChannelSettings(Strict):
    """Inner widths that get narrower: what makes the channels and what reads them lose the same."""

    macs: float = Field(gt=0, lt=1, description="the share of the UNet's multiply-adds that goes")
    importance: Literal["taylor", "magnitude"] = Field(
        default="taylor", description="which channels stay; see importance.py"
    )
    spread: Literal["even", "importance"] = Field(
        default="even",
        description="even: the same share of every group goes, so check tells the very widths; "
        "importance: layers compete, and check tells those of even in their place",
    )
    parts: tuple[Literal["resnets", "feed_forward", "heads"], ...] = Field(
        default=("resnets", "feed_forward", "heads"), strict=False, min_length=1
    )
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="globs on module paths that stay whole: up_blocks.3.*"
    )
    prompts: str | None = Field(
        default=None, min_length=1, description="file, a prompt a line; default: the source's own"
    )
    samples: int = Field(default=32, ge=1, le=10_000, description="pictures that taylor draws")

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if self.importance == "taylor":
            return []
        found = []
        if self.prompts is not None:
            found.append("prompts: goes with importance taylor; magnitude draws nothing; remove it")
        if self.spread == "importance":
            found.append(
                "spread: importance goes with importance taylor; magnitudes of different layers do "
                "not compare; set even"
            )
        return found


class PruneSettings(Settings):
    """Blocks, attention and channels of the UNet that go; what stays keeps its weights."""

    blocks: Annotated[
        Literal["bk_base", "bk_small", "bk_tiny"] | tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_tupled),
    ] = Field(
        default=(), description="as BK-SDM, or a list: down_blocks.0.resnets.1, mid_block, ..."
    )
    attention_levels: tuple[Annotated[int, Field(ge=0, le=7)], ...] = Field(
        default=(), strict=False, description="levels without attention; 0 has the most pixels"
    )
    channels: ChannelSettings | None = Field(default=None, description="None: every width stays")

    def faults(self) -> list[str]:
        if not self.blocks and not self.attention_levels and self.channels is None:
            return ["blocks: nothing is named to prune; give blocks, attention_levels or channels"]
        return [f"channels.{fault}" for fault in self.channels.faults()] if self.channels else []

    @property
    def draws(self) -> bool:
        """Whether pictures are drawn, by the recipe's schedule."""
        return self.channels is not None and self.channels.importance == "taylor"


Precision = Literal["float32", "bfloat16", "float16"]


class EmphasisSettings(Settings):
    """Prompts to learn from more often, where what they show is lost first."""

    matching: str = Field(
        min_length=1, description="a regular expression, found in the prompt; case does not matter"
    )
    share: float = Field(
        gt=0, le=1, description="of the draws, that go on until the prompt matches"
    )

    @property
    def pattern(self) -> re.Pattern[str]:
        """What to search prompts for."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what another Python may read otherwise
            return re.compile(self.matching, re.IGNORECASE)

    def faults(self) -> list[str]:
        try:
            self.pattern.search("")
        except (re.error, OverflowError, RecursionError) as error:
            told = self.matching if len(self.matching) < 80 else f"{self.matching[:80]}..."
            return [f"matching: {told!r} is no regular expression ({error})"]
        return []


class TrainingSettings(Settings):
    """How a stage trains: the same for all that do."""

    iterations: int = Field(ge=1, le=10_000_000, description="optimizer steps")
    batch: int = Field(default=16, ge=1, le=65_536, description="pictures a step, on each process")
    accumulate: int = Field(default=1, ge=1, le=4096, description="batches in an optimizer step")
    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    warmup: int = Field(default=100, ge=0, description="optimizer steps until the full rate")
    average_decay: float = Field(default=0.999, ge=0, lt=1, description="EMA; 0: none")
    precision: Precision = Field(default="bfloat16", description="of the arithmetic (autocast)")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")
    prompts: str | None = Field(
        default=None, min_length=1, description="file, a prompt a line; default: the source's own"
    )
    emphasis: EmphasisSettings | None = Field(
        default=None, description="prompts to learn from more often; None: all alike"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    save_every: int = Field(default=250, ge=1, description="steps between checkpoints")
    watch_every: int = Field(default=500, ge=1, description="steps between grids of pictures")

    def faults(self) -> list[str]:
        found = []
        if self.warmup > self.iterations:
            found.append(
                f"warmup: {self.warmup} steps are more than iterations ({self.iterations})"
            )
        if self.emphasis is not None:
            found += [f"emphasis.{fault}" for fault in self.emphasis.faults()]
        return found


def _pair(value: Any) -> Any:
    return (value, value) if type(value) is int else _tupled(value)


class ResolutionSettings(TrainingSettings):
    """An adaptation to the recipe's resolution, on pictures that are drawn larger and shrunk."""

    drawn_at: Annotated[
        tuple[Annotated[int, Field(ge=8, le=8192)], Annotated[int, Field(ge=8, le=8192)]],
        BeforeValidator(_pair),
    ] = Field(description="side in pixels, or [height, width], that the pipeline was trained for")
    guidance: float = Field(
        default=1.0, ge=0, le=100, description="that the pictures are drawn with, folded in"
    )
    pictures: int = Field(default=1024, ge=1, description="that are drawn, and shrunk")
    draw_steps: int = Field(default=25, ge=1, le=1000, description="the steps they are drawn in")
    empty_share: float = Field(
        default=0.1, ge=0, le=1, description="of prompts left out, for guidance afterwards"
    )
    decoder_iterations: int = Field(
        default=0, ge=0, le=10_000_000, description="of the VAE's decoder, before the UNet"
    )


class DistillSettings(TrainingSettings):
    """A student of fewer steps, or with fewer weights, from the pipeline as it was."""

    method: Literal["progressive", "lcm", "output"]
    steps: Literal[1, 2, 4, 8]
    guidance: Annotated[float | tuple[float, float], BeforeValidator(_tupled)] = Field(
        default=1.0,
        description="the teacher's guidance scale, folded in; [low, high]: drawn for each picture",
    )
    teacher_steps: int | None = Field(
        default=None,
        ge=2,
        le=1000,
        description="progressive: to halve from (8 times steps); lcm: the solver's (50; "
        "40 for 4 and 8 steps)",
    )
    pictures: int = Field(
        default=1024,
        ge=1,
        description="latents that the teacher draws first, to be noised (progressive, lcm)",
    )
    draw_steps: int = Field(default=25, ge=1, le=1000, description="the steps it draws them in")
    feature_weight: float = Field(
        default=0.0, ge=0, description="output: of the blocks' loss beside the output's (BK-SDM)"
    )
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="train a LoRA of this rank (LCM-LoRA: 64, learning_rate 1e-4); none: all",
    )

    def faults(self) -> list[str]:
        found = super().faults()
        scales = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)
        if any(not 0 <= scale <= 100 for scale in scales) or list(scales) != sorted(scales):
            found.append(f"guidance: {self.guidance} should be 0 to 100, or [low, high]")
        if isinstance(self.guidance, tuple) and self.method != "lcm":
            found.append(f"guidance: a range goes with method lcm, and this is {self.method}")
        if self.method == "progressive":
            ratio, rest = divmod(self.halve_from, self.steps)
            if rest or ratio < 2 or ratio & (ratio - 1):
                found.append(
                    f"teacher_steps: {self.halve_from} cannot be halved to {self.steps}; give "
                    f"{2 * self.steps}, {4 * self.steps}, {8 * self.steps}, ..."
                )
        if self.method != "output" and self.feature_weight:
            found.append(f"feature_weight: goes with method output, and this is {self.method}")
        if self.method == "output" and self.teacher_steps is not None:
            found.append("teacher_steps: method output has a teacher of as many steps; remove it")
        return found

    @property
    def halve_from(self) -> int:
        """The steps that progressive distillation begins with."""
        return self.teacher_steps or 8 * self.steps


class FinetuneSettings(TrainingSettings):
    """Quantization-aware fine-tuning of the UNet for the `quantize` stage that follows."""

    feature_weight: float = Field(
        default=0.0, ge=0, description="of the block outputs' loss beside the output's (BK-SDM)"
    )


class DecoderSettings(TrainingSettings):
    """A tiny VAE decoder (diffusers' `AutoencoderTiny`), opened or distilled."""

    iterations: int = Field(default=0, ge=0, le=10_000_000, description="0: as it was opened")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    warmup: int = Field(default=0, ge=0)
    model: str | None = Field(
        default=None, min_length=1, description="TAESD by folder or hub id; none: begin anew"
    )
    revision: str | None = Field(default=None, min_length=1, description="of a hub id")
    channels: int | None = Field(
        default=None, ge=4, le=1024, description="width of one that begins anew (64)"
    )
    blocks: int | None = Field(
        default=None, ge=1, le=16, description="its residual blocks at each size but the last (3)"
    )
    pictures: int = Field(default=1024, ge=1, description="latents that the pipeline draws first")
    noise: float = Field(
        default=0.1, ge=0, le=1, description="on a second copy of them, of their deviation at most"
    )
    feature_weight: float = Field(
        default=0.0, ge=0, description="of the loss on the VAE encoder's features of the pictures"
    )
    detail_balance: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="1: each picture counts by the inverse of its detail; 0: all alike",
    )
    held_out: int = Field(
        default=16, ge=0, le=10_000, description="latents to measure the PSNR on; 0: not measured"
    )

    def faults(self) -> list[str]:
        found = super().faults()
        if self.model is None and not self.iterations:
            found.append("iterations: one that begins anew has to be trained; or name a model")
        if self.emphasis is not None and not self.iterations:
            found.append("emphasis: nothing is trained without iterations; remove it")
        if self.model is None and self.revision is not None:
            found.append("revision: goes with a model, and none is named; remove it")
        for key in ("channels", "blocks"):
            if self.model is not None and getattr(self, key) is not None:
                found.append(f"{key}: {self.model} brings its own; remove {key} or model")
        return found

    @property
    def width(self) -> int:
        """The channels of a decoder that begins anew."""
        return self.channels or 64

    @property
    def depth(self) -> int:
        """The residual blocks at each of its sizes but the last, which has one."""
        return self.blocks or 3


class FoldSettings(Settings):
    """The time path becomes a table of the schedule's steps; nothing to set."""


class Rule(Strict):
    """What happens to the layers that match; of several rules that match, the last one wins."""

    layers: str = Field(min_length=1, description="glob on module paths, e.g. unet.conv_in")
    weights: Literal["int8", "int4", "float32"]
    activations: Activations | None = Field(default=None, description="None: as the stage says")
    reason: str = Field(min_length=1)

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if self.weights == "float32" and self.activations not in (None, "none"):
            return [
                f"activations: {self.activations} needs weights int8; no target multiplies "
                "integer activations by float weights"
            ]
        return []


class Int4Settings(Strict):
    """Weights of 4 bits in blocks, beside a float branch of low rank; see int4_layers.py."""

    block: Literal[16, 32, 64, 128] = Field(
        default=32, description="input channels that share a step; less where they do not divide"
    )
    rank: int = Field(default=32, ge=0, le=512, description="of the float branch; 0: plain 4 bits")
    branch_share: float = Field(
        default=0.5,
        gt=0,
        le=16,
        description="of the integers' bytes, that the branch may take: small layers have less rank",
    )
    iterations: int = Field(
        default=4, ge=1, le=64, description="in which the branch takes up what rounding left"
    )


class CalibrationSettings(Strict):
    """Where the scales of static activations come from: pictures that the pipeline draws."""

    prompts: str | None = Field(
        default=None, min_length=1, description="file, a prompt a line; default: the source's own"
    )
    samples: int = Field(default=32, ge=1, le=10_000, description="pictures that are drawn")
    seed: int = Field(default=0, ge=0, lt=2**31)
    observer: Literal["minmax", "percentile", "mse"] = Field(
        default="mse", description="what a range is made from; see calibrate.py"
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="of the values, at either end; for percentile"
    )


class KeepSettings(Strict):
    """Which layers stay in float: those that alone cost the most. One of three budgets.

    A layer with static activations keeps float activations, and its weights stay integers; one
    without, and any layer by a budget of bytes, keeps its float weights as well.
    """

    min_snr_db: float | None = Field(
        default=None, gt=0, description="layers that alone leave their component's output below it"
    )
    macs: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="as many as leave INT8 this share of the multiply-adds that each component's "
        "convolutions and linears have",
    )
    bytes: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="as many as leave each component's weights this share of their float32 bytes",
    )
    samples: int = Field(default=2, ge=1, le=256, description="pictures that it is measured on")

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if sum(budget is not None for budget in (self.min_snr_db, self.macs, self.bytes)) != 1:
            return ["give min_snr_db, macs or bytes, one of the three"]
        return []


class QuantizeSettings(Settings):
    """Integer weights: INT8 per output channel, where activations may be INT8 too, or 4 bits."""

    weights: Literal["int8", "int4"] = Field(
        default="int8", description="int4: of the layers that can be; conv_in, conv_out stay int8"
    )
    int4: Int4Settings = Int4Settings()
    activations: Activations = "none"
    calibration: CalibrationSettings = CalibrationSettings()
    keep: KeepSettings | None = Field(default=None, description="None: no layer, but by rules")
    split_skips: bool = Field(
        default=True,
        description="int8_static: a scale for each half of a skip concat that a conv reads",
    )
    components: tuple[ComponentName, ...] = Field(
        default=NEEDED_COMPONENTS, strict=False, min_length=1
    )
    embedding_min_saving: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="an embedding is quantized if that saves this share of its component's bytes",
    )
    rules: tuple[Rule, ...] = Field(default=(), strict=False)

    @property
    def every_activations(self) -> set[str]:
        """What the stage and its rules ask for."""
        return {self.activations, *(rule.activations for rule in self.rules if rule.activations)}

    @property
    def keeps_weights(self) -> bool:
        """Whether a budget decides which weights stay in float."""
        if self.keep is None:
            return False
        return self.keep.bytes is not None or "int8_static" not in self.every_activations

    @property
    def every_weights(self) -> set[str]:
        """What the stage and its rules ask for."""
        return {self.weights, *(rule.weights for rule in self.rules)}

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        found = []
        if "int4" not in self.every_weights and self.int4 != Int4Settings():
            found.append("int4: goes with weights int4, of the stage or of a rule; remove it")
        if "int4" in self.every_weights and self.every_activations != {"none"}:
            found.append(
                "weights: int4 goes with float activations; set activations to none, also in "
                "rules, or use weights int8"
            )
        for index, rule in enumerate(self.rules):
            found += [f"rules.{index}.{fault}" for fault in rule.faults()]
            head = rule.layers.split(".")[0]
            if not set(head) & set("*?[") and head not in self.components:
                found.append(
                    f"rules.{index}.layers: {rule.layers!r} begins with {head!r}, which is none of "
                    f"the stage's components ({', '.join(self.components)})"
                    + did_you_mean(head, list(self.components))
                )
        if self.keep is not None:
            found += [f"keep: {fault}" for fault in self.keep.faults()]
            if self.keep.macs is not None and "int8_static" not in self.every_activations:
                found.append("keep.macs: goes with activations int8_static; use bytes")
        return found
