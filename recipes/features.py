"""The networks that a user names for figures on features, and the pictures of a folder.

Weights are safetensors, or an ONNX graph, which is data: nothing that is opened can run code. A
TorchScript file (the usual form of FID's Inception) can, so it is not opened; `Network` tells what
to export instead.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from mobile_runtime.bundle import sha256
from mobile_runtime.errors import UserError, missing_backend
from recipes.paths import user_path
from recipes.sources.diffusers_folder import check_safetensors
from recipes.sources.hub import fetch

BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg")
WAYS_OUT = (
    "download it on a machine with access (`hf download OWNER/NAME --local-dir FOLDER`) and name "
    "the folder"
)
CLIP_FILES = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt")
CLIP_WEIGHTS = "model.safetensors"


class Features(Protocol):
    """Pictures to features."""

    info: dict[str, Any]

    def pictures(self, pictures: Iterable[np.ndarray], count: int) -> np.ndarray:
        """(H, W, 3) uint8 pictures, of any sizes -> (count, D) float64."""


class Clip:
    """A CLIP model with its image processor and tokenizer; see `open_clip`."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, info: dict[str, Any]) -> None:
        from recipes.trainer import accelerator

        self.device = accelerator().device
        self.model = model.to(self.device)
        self.processor, self.tokenizer, self.info = processor, tokenizer, info

    def pictures(self, pictures: Iterable[np.ndarray], count: int) -> np.ndarray:
        """Projected features (count, D) of pictures, as their processor cuts them."""
        import torch

        rows = []
        for batch in _batches(pictures, count, "CLIP features"):
            pixels = self.processor(images=batch, return_tensors="pt").pixel_values
            with torch.no_grad():
                rows.append(self.model.get_image_features(pixel_values=pixels.to(self.device)))
        return _finite(torch.cat(rows).double().cpu().numpy(), self.info["id"])

    def texts(self, prompts: list[str]) -> np.ndarray:
        """Projected features (N, D) of texts, which are cut at the model's length."""
        import torch

        rows = []
        for batch in _batches(prompts, len(prompts), "CLIP features of prompts"):
            tokens = self.tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                rows.append(self.model.get_text_features(**tokens))
        return _finite(torch.cat(rows).double().cpu().numpy(), self.info["id"])


def open_clip(named: str) -> Clip:
    """Open a `CLIPModel` with its processor and tokenizer: a folder, or a hub id.

    It is tried on one picture and one text. Raises UserError with one sentence.
    """
    path = user_path(named)
    if path.exists() or named.startswith(("/", "./", "../", "~")) or named.count("/") != 1:
        if not path.is_dir():
            raise UserError(f"--clip: {named!r} is no folder and no hub id (owner/name)")
        return _open_clip(path, {"id": path.resolve().name})
    folder, commit = fetch(
        named, None, _clip_files(named), [*CLIP_FILES, CLIP_WEIGHTS], f"{WAYS_OUT} as --clip"
    )
    return _open_clip(folder, {"id": named, "revision": commit})


def _clip_files(named: str) -> Any:
    def choose(files: list[str]) -> list[str]:
        if CLIP_WEIGHTS not in files:
            raise _no_safetensors(named)
        return [*CLIP_FILES, CLIP_WEIGHTS]

    return choose


def _no_safetensors(where: str) -> UserError:
    return UserError(
        f"--clip: {where} holds no {CLIP_WEIGHTS}, and pickled weights (.bin) may run code when "
        "opened; open those yourself with transformers and save them again"
    )


def _open_clip(folder: Path, info: dict[str, Any]) -> Clip:
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    for name in CLIP_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"--clip: {folder} has no {name}; give the whole folder of a CLIPModel, as "
                "openai/clip-vit-large-patch14 has it"
            )
    weights = folder / CLIP_WEIGHTS
    if not weights.is_file():
        raise _no_safetensors(str(folder))
    check_safetensors(weights)
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"--clip: {folder}/config.json cannot be read: {error}") from None
    if kind != "clip":
        raise UserError(f"--clip: {folder} is a model of type {kind!r}; give one of type 'clip'")
    try:
        # mypy does not know the classes of transformers' lazy modules.
        opened: Any = CLIPModel
        model, told = opened.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        clip = Clip(
            model.eval().requires_grad_(False),
            CLIPImageProcessor.from_pretrained(folder, local_files_only=True),
            CLIPTokenizer.from_pretrained(folder, local_files_only=True),
            {**info, "sha256": sha256(weights)},
        )
        missing = sorted(told["missing_keys"])
        if not missing:
            clip.pictures([np.zeros((64, 64, 3), np.uint8)], 1)
            clip.texts(["a picture"])
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"--clip: {folder} does not work as a CLIP model: {_brief(error)}"
        ) from error
    if missing:
        raise UserError(
            f"--clip: {weights} lacks {len(missing)} of the model's weights, {missing[0]} first; "
            "download it again"
        )
    return clip


class Network:
    """A feature network as an ONNX file, for FID and KID; see `open_network`."""

    def __init__(self, session: Any, info: dict[str, Any]) -> None:
        self.session, self.info = session, info
        (self.input,), (self.output,) = session.get_inputs(), session.get_outputs()

    def pictures(self, pictures: Iterable[np.ndarray], count: int) -> np.ndarray:
        """Features (count, D) of pictures, resized with an antialiasing bicubic filter.

        Resized as clean-fid does (Parmar et al., arXiv:2104.11222): in float, channel by channel.
        """
        fixed, _, height, width = self.input.shape
        size = fixed if isinstance(fixed, int) else BATCH
        rows = []
        for batch in _batches(pictures, count, "features", size):
            fed = np.stack([_resized(picture, height, width) for picture in batch])
            # The last batch of a graph that takes a fixed number is filled up.
            fill = size - len(fed) if isinstance(fixed, int) else 0
            fed = np.concatenate([fed, np.repeat(fed[-1:], fill, axis=0)])
            (out,) = self.session.run([self.output.name], {self.input.name: fed})
            if out.shape[0] != len(fed):
                raise ValueError(f"{len(fed)} pictures gave features of shape {out.shape}")
            rows.append(out.reshape(len(fed), -1)[: len(batch)].astype(np.float64))
        return _finite(np.concatenate(rows), self.info["id"])


def open_network(path: Path) -> Network:
    """Open a feature network, and try it on one picture.

    An .onnx file with one input (N, 3, H, W), float32 in 0..255, H and W fixed, and one output
    (N, D): what FID's Inception takes and gives. Raises UserError with one sentence.
    """
    if not path.is_file() or path.suffix != ".onnx":
        raise UserError(
            f"--features: {path} is no .onnx file; of other files only CLIP's features are taken "
            "(--clip), because opening TorchScript may run code: export yours with torch.onnx"
        )
    try:
        import onnxruntime
    except ImportError:
        raise missing_backend("onnxruntime", "runtime", "--features") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs, outputs = session.get_inputs(), session.get_outputs()
    except Exception as error:  # its errors share no class
        raise UserError(f"--features: {path} does not load: {_brief(error)}") from None
    wanted = "one input (N, 3, H, W), float32 in 0..255 with fixed H and W, and one output (N, D)"
    shapes = [list(tensor.shape) for tensor in (*inputs, *outputs)]
    if len(inputs) != 1 or len(outputs) != 1 or not _takes_pictures(inputs[0]):
        raise UserError(f"--features: {path} has tensors of shapes {shapes}; it needs {wanted}")
    network = Network(session, {"id": path.name, "sha256": sha256(path)})
    try:
        network.pictures([np.zeros((64, 64, 3), np.uint8)], 1)
    except Exception as error:
        raise UserError(f"--features: {path} does not run: {_brief(error)}") from None
    return network


def _takes_pictures(tensor: Any) -> bool:
    shape = tensor.shape
    return (
        tensor.type == "tensor(float)"
        and len(shape) == 4
        and shape[1] == 3
        and all(isinstance(side, int) and side > 0 for side in shape[2:])
    )


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for channel in np.moveaxis(picture, 2, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels])


class Folder:
    """The PNG and JPEG files of a folder; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where there are fewer than two."""
        if not folder.is_dir():
            raise UserError(f"--pictures: {folder} is no folder")
        self.files = sorted(
            file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if len(self.files) < 2:
            raise UserError(
                f"--pictures: {folder} holds {len(self.files)} pictures ({', '.join(SUFFIXES)}), "
                "and their distribution takes two at least"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each picture as (H, W, 3) uint8; UserError where one cannot be read."""
        for file in self.files:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(file) as image:
                        yield np.asarray(image.convert("RGB"))
            except (
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
                Image.DecompressionBombWarning,
            ) as error:
                raise UserError(
                    f"--pictures: {file} cannot be read ({_brief(error)}); remove it, or get it "
                    "again"
                ) from None


def _batches(items: Iterable[Any], count: int, told: str, size: int = BATCH) -> Iterator[list[Any]]:
    left = iter(items)
    with tqdm(total=count, desc=told, delay=2, leave=False) as bar:
        while batch := list(islice(left, size)):
            yield batch
            bar.update(len(batch))


def _finite(rows: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise UserError(f"{where} gives features that are not finite; its weights are damaged")
    return rows


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
