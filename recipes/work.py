"""Where a stage works, and where the results of training are kept and found again.

A trained result is kept under a key: the hash of the source's weights, and of every setting up to
its stage. The same recipe on the same source then takes seconds the second time, and a training
that was killed goes on from its checkpoint. The package ships the results of its own recipes in
the same form (`SHIPPED`).
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mobile_runtime.bundle import sha256
from mobile_runtime.cache import VARIABLE, cache_root
from mobile_runtime.errors import UserError, missing_backend
from mobile_runtime.manifest import LayerPlan
from recipes import component_folder, prompts
from recipes.measure import with_modules
from recipes.paths import user_path
from recipes.schema import PRESERVING, Recipe, Stage

SHIPPED = Path(__file__).parent / "pocket" / "trained"
RECORD = "record.json"
TRAINING = "training"
LEFT = (".png", ".csv", ".safetensors")
"""What a training leaves beside its result, in `TRAINING`: pictures, curves, a LoRA."""
ADDED_LATER = {
    "distill": ("lora_rank", "emphasis"),
    "prune": ("channels",),
    "decoder": ("detail_balance", "emphasis"),
    "resolution": ("emphasis",),
    "finetune": ("emphasis",),
}
"""By stage: settings that came after results had been kept. With its default one is no part of a
key, so that those results are still found."""


def default_cache() -> Path:
    """`$POCKET_DIFFUSION_CACHE` itself, else a folder in the user's cache folder."""
    return cache_root() if os.environ.get(VARIABLE) else cache_root() / "stages"


def kept_at(result: str) -> Path:
    """Where the result of a training lies, by the name that the stage's record has for it."""
    shipped = SHIPPED / result
    return shipped if shipped.is_dir() else default_cache() / result


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves: the pipeline, its layers' plans, and what it has to tell (JSON)."""

    pipeline: Any
    plans: list[LayerPlan] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[dict[str, Any], ...] = ()
    """Of a kept result: the records of the stages before it, as they were when it was made."""


@dataclass(frozen=True)
class Work:
    """What a stage may use beside the pipeline.

    folder: the stage's own, for checkpoints and pictures, which a killed run finds again; only
    for stages that train. teacher: the UNet that came with the source, or that the latest
    distillation left; prunings since are not in it.
    """

    recipe: Recipe
    teacher: Any
    folder: Path
    trained: tuple[str, ...] = ()
    kept: Path | None = None
    key: str = ""

    def found(self, pipeline: Any) -> Outcome | None:
        """The result of an earlier run of the same stage on the same inputs, if it was kept."""
        if self.kept is None:
            return None
        for folder in (SHIPPED / self.kept.name, self.kept):
            if (folder / RECORD).is_file():
                kept = _read_record(folder)
                if kept.get("key") != self.key:
                    raise UserError(
                        f"{folder} is damaged, or the result of other inputs than its name says; "
                        "delete it"
                    )
                there = hashes(folder, self.trained)
                if kept.get("sha256", there) != there:
                    raise UserError(f"{folder} has changed since it was made; delete it")
                modules = {name: component_folder.load(folder / name) for name in self.trained}
                found_in = "the package" if folder.parent == SHIPPED else "the cache"
                return Outcome(
                    with_modules(pipeline, modules),
                    record={**kept["record"], "trained": f"earlier, found in {found_in}"},
                    earlier=tuple(kept.get("earlier", ())),
                )
        return None

    def keep(self, outcome: Outcome, earlier: Sequence[dict[str, Any]]) -> Outcome:
        """Keep the result of a training, with the pictures, curves and LoRA that it left.

        earlier: the records of the stages before it. What only served to resume it is deleted.
        Raises UserError for weights that are not finite.
        """
        if self.kept is None or not _is_main_process():
            return outcome
        for name in self.trained:
            _check_finite(name, getattr(outcome.pipeline, name))
        fresh = self.folder / "result"
        shutil.rmtree(fresh, ignore_errors=True)
        for name in self.trained:
            component_folder.save(getattr(outcome.pipeline, name), fresh / name)
        (fresh / TRAINING).mkdir()
        for left in self.folder.iterdir():
            if left.suffix in LEFT:
                shutil.copy2(left, fresh / TRAINING / left.name)
        record = {
            "key": self.key,
            "record": outcome.record,
            "earlier": list(earlier),
            "sha256": hashes(fresh, self.trained),
        }
        (fresh / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        # Without its record, what lies there is no result.
        shutil.rmtree(self.kept, ignore_errors=True)
        fresh.rename(self.kept)
        return outcome


@dataclass
class Done:
    """The inputs of the stage that comes next: the source, and the stages that have run."""

    recipe: Recipe
    cache: Path
    inputs: list[Any]

    @classmethod
    def before(cls, pipeline: Any, recipe: Recipe, cache: Path | None, keeps: bool) -> "Done":
        """Before any stage has run on a pipeline. keeps: whether one of them trains."""
        inputs: list[Any] = [fingerprint(pipeline), recipe.resolution] if keeps else []
        return cls(recipe, cache or default_cache(), inputs)

    def add(self, stage: Stage) -> tuple[str, Path]:
        """Count a stage among the inputs of the next; its result's key, and its place."""
        settings = _contents(stage.settings.model_dump(mode="json"))
        if "prompts" in settings and settings["prompts"] is None:
            settings["prompts"] = prompts.default_of(self.recipe)
        for later in ADDED_LATER.get(stage.name, ()):
            if settings[later] == type(stage.settings).model_fields[later].default:
                del settings[later]
        entry = [stage.name, settings]
        if stage.decoder:
            # Its latents are drawn by the recipe's schedule; a distillation names its own.
            entry.append(self.recipe.schedule.model_dump(mode="json"))
        if stage.prune and stage.prune.draws:
            channels = settings["channels"]
            channels["prompts"] = channels["prompts"] or prompts.default_of(self.recipe)
            entry.append(self.recipe.schedule.model_dump(mode="json"))
        if stage.finetune:
            # It trains for the integers to come, along the recipe's schedule.
            entry.append(self.recipe.schedule.model_dump(mode="json"))
            preserving = [later for later in self.recipe.stages if later.name in PRESERVING]
            entry += [self._trained_for(later) for later in preserving]
        self.inputs.append(entry)
        key = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        return key, self.cache / f"{stage.name}-{key[:16]}"

    def _trained_for(self, stage: Stage) -> list[Any]:
        """What a fine-tuning of the UNet depends on in a stage that comes after it.

        Without defaults, so that a setting that is new some day changes no key.
        """
        own = {"components"}  # the UNet is among them, and the others are none of its business
        settings = stage.settings.model_dump(mode="json", exclude=own, exclude_defaults=True)
        entry = [stage.name, _contents(settings)]
        if stage.quantize and stage.quantize.calibration.prompts is None:
            entry.append(prompts.default_of(self.recipe))
        return entry

    def kept(self, chosen: Sequence[Stage]) -> list[bool]:
        """For each of the stages that come next, whether its result is kept."""
        ahead = replace(self, inputs=list(self.inputs))
        return [_is_kept(ahead.add(stage)[1]) for stage in chosen]

    def check_ready(self, chosen: Sequence[Stage], trained: Sequence[bool]) -> None:
        """Refuse what no training here could end, before any stage works.

        trained: for each of the stages, whether it would train.
        """
        steps = [getattr(stage.settings, "iterations", 1) for stage in chosen]
        trains = any(here and count > 0 for here, count in zip(trained, steps, strict=True))
        if trains and importlib.util.find_spec("matplotlib") is None:
            raise missing_backend("matplotlib", "train", "training")

    @contextlib.contextmanager
    def work(self, stage: Stage, trained: tuple[str, ...], teacher: Any) -> Iterator[Work]:
        """The stage's place to work. Only one process at a time trains the same thing."""
        key, kept = self.add(stage)
        if not trained:
            yield Work(self.recipe, teacher, folder=Path())
            return
        folder = kept.with_name(f"{kept.name}.work")
        work = Work(self.recipe, teacher, folder, trained, kept, key)
        if _is_kept(kept):
            yield work
            return
        if not _is_main_process():
            yield work
            return
        with _alone(folder):
            yield work
        shutil.rmtree(folder, ignore_errors=True)


def _check_finite(name: str, part: Any) -> None:
    """Refuse to keep what a training broke."""
    for key, weight in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(
                f"the training left NaN or Inf in {name}.{key}; lower learning_rate, or train in "
                "float32"
            )


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("record"), dict) else {}


def hashes(folder: Path, components: Sequence[str]) -> dict[str, str]:
    """Of each file of the components, by its path."""
    files = [file for name in components for file in (folder / name).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(files)}


def _is_kept(kept: Path) -> bool:
    return any((place / RECORD).is_file() for place in (SHIPPED / kept.name, kept))


def _is_main_process() -> bool:
    """Of several that `accelerate launch` started, one writes."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"a training cannot keep its checkpoints in {folder} ({error.strerror}); name another "
            "folder with POCKET_DIFFUSION_CACHE"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at this training already (it works in {folder}); wait for it"
            ) from None
        yield


# Of a configuration, what weights alone do not tell. Not all of it: a newer diffusers adds keys.
_TELLING = {
    "text_encoder": ("hidden_act", "num_attention_heads"),
    "unet": ("attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_num_groups"),
    "vae": ("scaling_factor", "norm_num_groups"),
}


def fingerprint(pipeline: Any) -> str:
    """SHA-256 of a pipeline's weights, and of the settings that say what they compute."""
    digest = hashlib.sha256()
    for name, keys in _TELLING.items():
        part = getattr(pipeline, name)
        told = {key: repr(getattr(part.config, key, None)) for key in keys}
        digest.update(json.dumps([type(part).__name__, told]).encode())
        for key, tensor in part.state_dict().items():
            digest.update(f"{name}.{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    scheduler, tokenizer = pipeline.scheduler, pipeline.tokenizer
    others = [
        [type(scheduler).__name__, _chosen(scheduler)],
        [
            sorted(tokenizer.get_vocab().items()),
            sorted(map(str, getattr(tokenizer, "bpe_ranks", {}).items())),
            [tokenizer.model_max_length, tokenizer.pad_token_id],
        ],
    ]
    digest.update(json.dumps(others, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _chosen(scheduler: Any) -> dict[str, Any]:
    """A scheduler's settings that are not its class's own, so that new ones change no key."""
    own = inspect.signature(type(scheduler).__init__).parameters
    return {
        key: value
        for key, value in scheduler.config.items()
        if key in own and value != own[key].default
    }


def _contents(settings: Any) -> Any:
    """Settings with each file or folder that they name replaced by what it holds."""
    if isinstance(settings, dict):
        return {
            key: _digest(value)
            if key in ("prompts", "model") and isinstance(value, str)
            else _contents(value)
            for key, value in settings.items()
        }
    return [_contents(value) for value in settings] if isinstance(settings, list) else settings


def _digest(named: str) -> str:
    path = user_path(named)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return named
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
