"""Reads a `.mlpackage` folder: its manifest, its model protobuf, and its weight files.

NAME.mlpackage/Manifest.json                        names the items and which is the model
NAME.mlpackage/Data/com.apple.CoreML/model.mlmodel  protobuf, CoreML.Specification.Model
NAME.mlpackage/Data/com.apple.CoreML/weights/       what the program calls @model_path/weights
"""

import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path, PurePosixPath
from typing import Any

from mobile_runtime.backends.mil.weights import WeightFile
from mobile_runtime.errors import BundleError, UserError, missing_backend
from mobile_runtime.manifest import ComponentEntry

MODEL_PATH = "@model_path"
ARRAY_TYPES = {"float16": 65552, "float32": 65568, "int32": 131104}
"""FeatureTypes.proto, ArrayFeatureType.ArrayDataType."""
PROTO_PACKAGE = "_coremltools_proto"


def model_proto() -> Any:
    """The generated module of Core ML's model format (`Model_pb2`), from coremltools.

    Importing coremltools itself takes seconds and loads torch, its converters and more; the
    generated protobuf modules need nothing but protobuf, so they are imported alone.
    """
    found = importlib.util.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        raise missing_backend("coremltools", "coreml", "the ML-program interpreter")
    if PROTO_PACKAGE not in sys.modules:
        package = types.ModuleType(PROTO_PACKAGE)
        package.__path__ = [str(Path(found.submodule_search_locations[0]) / "proto")]
        sys.modules[PROTO_PACKAGE] = package
    try:
        return importlib.import_module(f"{PROTO_PACKAGE}.Model_pb2")
    except ImportError as error:
        raise missing_backend("protobuf", "coreml", "the ML-program interpreter") from error


class Package:
    """An opened `.mlpackage`: the model's protobuf, and its weight files, mapped on demand."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the manifest and the model; raises UserError or BundleError in one sentence."""
        self.path = Path(path)
        self.model_file = self._find_model()
        self.spec = self._parse()
        self._weights: dict[str, WeightFile] = {}

    def _find_model(self) -> Path:
        manifest = self.path / "Manifest.json"
        if not manifest.is_file():
            raise UserError(f"{self.path} is not an .mlpackage: it has no Manifest.json")
        try:
            content = json.loads(manifest.read_bytes())
            item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{manifest} does not name the package's model: {error!r}") from error
        return self._inside(self.path / "Data", str(item))

    def _inside(self, folder: Path, relative: str) -> Path:
        path = folder / PurePosixPath(relative)
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path}: the path {relative!r} points outside the package")
        if not path.is_file():
            raise BundleError(f"{path} is missing; make the bundle again")
        return path

    def _parse(self) -> Any:
        from google.protobuf.message import DecodeError

        spec = model_proto().Model()
        try:
            spec.ParseFromString(self.model_file.read_bytes())
        except DecodeError as error:
            raise BundleError(f"{self.model_file} is not a Core ML model: {error}") from error
        kind = spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise UserError(
                f"{self.path} holds a model of type {kind or 'none'}; the interpreter runs ML "
                "programs: convert with convert_to='mlprogram'"
            )
        return spec

    def check_interface(self, entry: ComponentEntry) -> None:
        """Raise BundleError unless the package describes itself as the manifest does.

        Core ML reads the description, and apps by it; the program runs without.
        """
        described, version = self.spec.description, entry.details.get("specification_version")
        for kind, specs in (("input", entry.inputs), ("output", entry.outputs)):
            given = {
                one.name: (tuple(one.type.multiArrayType.shape), one.type.multiArrayType.dataType)
                for one in getattr(described, kind)
            }
            wanted = {spec.name: (spec.shape, ARRAY_TYPES.get(spec.dtype)) for spec in specs}
            if given != wanted:
                raise BundleError(
                    f"{self.path} describes its {kind}s as {given}, and the manifest as {wanted}; "
                    "make the bundle again"
                )
        if version is not None and self.spec.specificationVersion != version:
            raise BundleError(
                f"{self.path} has specification version {self.spec.specificationVersion}, and the "
                f"manifest says {version}; make the bundle again"
            )

    def weights(self, name: str) -> WeightFile:
        """The weight file that a program calls `name`, e.g. @model_path/weights/weight.bin."""
        if name not in self._weights:
            if not name.startswith(MODEL_PATH + "/"):
                raise BundleError(f"{self.path}: {name!r} does not start with {MODEL_PATH}")
            path = self._inside(self.model_file.parent, name.removeprefix(MODEL_PATH + "/"))
            self._weights[name] = WeightFile(path)
        return self._weights[name]
