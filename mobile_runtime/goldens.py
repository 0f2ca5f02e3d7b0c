"""The golden cases of an opened bundle: what to feed, and the references.

How their tensors are named is told in bundle.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.manifest import ComponentName, GoldenPrompt, TensorSpec
from mobile_runtime.sampler import needs_fresh_noise
from mobile_runtime.sketches import SKETCH_SIZE

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One golden case of a component: what to feed, and the two references."""

    inputs: Arrays
    same_function: Arrays
    source: Arrays


@dataclass(frozen=True)
class GoldenFile:
    """The tensors of one golden file; what is asked for and not there is an error by its name."""

    path: Path
    tensors: Arrays

    def get(
        self, name: str, shape: tuple[int, ...] | None = None, dtype: type | None = None
    ) -> np.ndarray:
        """One tensor; BundleError where it is missing or, if they are given, of another form."""
        if name not in self.tensors:
            raise BundleError(f"{self.path} has no tensor {name}; make the bundle again")
        tensor = self.tensors[name]
        if shape is not None and tensor.shape != shape:
            raise BundleError(f"{self.path}: {name} has shape {tensor.shape}, not {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise BundleError(
                f"{self.path}: {name} has dtype {tensor.dtype}, not {np.dtype(dtype)}"
            )
        return tensor

    def group(self, prefix: str, specs: Sequence[TensorSpec], *, formed: bool = True) -> Arrays:
        """The tensors under a prefix, by the rest of their names; each of `specs` is there.

        formed: they have the shapes of `specs`.
        """
        for spec in specs:
            self.get(prefix + spec.name, spec.shape if formed else None)
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def open_golden(bundle: Bundle, relative: str) -> GoldenFile:
    """Read one golden file of a bundle."""
    return GoldenFile(bundle.file(relative), bundle.golden(relative))


def golden_cases(bundle: Bundle, component: ComponentName) -> list[Case]:
    """The golden cases of a component, in order; raises BundleError where one is not whole."""
    golden = bundle.manifest.golden
    count = golden.cases.get(component, 0)
    if count == 0:
        return []
    entry = bundle.component(component)
    file = open_golden(bundle, golden.components[component])
    return [
        Case(
            file.group(f"{k}/in/", entry.inputs),
            file.group(f"{k}/out/", entry.outputs),
            file.group(f"{k}/source/", entry.outputs, formed=False),
        )
        for k in range(count)
    ]


@dataclass(frozen=True)
class PromptCase:
    """One golden run of the whole pipeline. h, w: the latents' size; n: steps.

    noise (1, C, h, w), fresh_noise (n, C, h, w) where the schedule takes any, trajectory
    (n + 1, C, h, w), all float32; picture and source_picture (H, W, 3) uint8. between: what passed
    between the sampler and the models (converters/golden.py); empty in bundles that have it not.
    """

    golden: GoldenPrompt
    noise: np.ndarray
    fresh_noise: np.ndarray | None
    trajectory: np.ndarray
    picture: np.ndarray
    source_picture: np.ndarray
    between: Arrays


def prompt_case(bundle: Bundle, index: int) -> PromptCase:
    """One golden prompt; raises BundleError where it is not whole."""
    file = open_golden(bundle, bundle.manifest.golden.pipeline)
    golden = bundle.manifest.golden.prompts[index]
    g = bundle.manifest.generation
    latents = (g.latent_channels, g.latent_height, g.latent_width)
    table = bundle.manifest.schedule(golden.steps)
    fresh_noise = None
    if table is not None and needs_fresh_noise(table):
        fresh_noise = file.get(f"{index}/fresh_noise", (golden.steps, *latents), np.float32)
    picture, source = (
        file.get(f"{index}/{name}", (g.height, g.width, 3), np.uint8)
        for name in ("picture", "source_picture")
    )
    return PromptCase(
        golden=golden,
        noise=file.get(f"{index}/noise", (1, *latents), np.float32),
        fresh_noise=fresh_noise,
        trajectory=file.get(f"{index}/trajectory", (golden.steps + 1, *latents), np.float32),
        picture=picture,
        source_picture=source,
        between=_between(bundle, file, index) if f"{index}/out_sample" in file.tensors else {},
    )


def _between(bundle: Bundle, file: GoldenFile, index: int) -> Arrays:
    calls = len(file.get(f"{index}/out_sample"))
    (unet,), (latents,) = bundle.component("unet").outputs, bundle.component("vae_decoder").inputs
    forms = {
        "out_sample": (calls, *unet.shape),
        "timestep": (calls,),
        "sample": (calls, SKETCH_SIZE),
        "latent_sample": latents.shape,
    }
    return {name: file.get(f"{index}/{name}", shape, np.float32) for name, shape in forms.items()}
