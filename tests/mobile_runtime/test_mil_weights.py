"""Weight files: our reader agrees with Apple's own storage library, and refuses damage."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobile_runtime.backends.mil.weights import WeightFile, packed_bytes, unpack
from mobile_runtime.errors import BundleError
from tests.mobile_runtime.mil_programs import coremltools

# MIL's type, the writer's name for it, the numpy type it takes, and the values that fit.
STORED = {
    "FLOAT16": ("fp16", np.uint16, 0, 0x7BFF),
    "FLOAT32": ("float", np.float32, -1, 1),
    "UINT8": ("uint8", np.uint8, 0, 255),
    "INT8": ("int8", np.int8, -128, 127),
    "INT16": ("int16", np.int16, -(2**15), 2**15 - 1),
    "UINT16": ("uint16", np.uint16, 0, 2**16 - 1),
    "INT32": ("int32", np.int32, -(2**31), 2**31 - 1),
    "UINT32": ("uint32", np.uint32, 0, 2**32 - 1),
    "INT4": ("int4", np.int8, -8, 7),
    "UINT1": ("uint1", np.uint8, 0, 1),
    "UINT2": ("uint2", np.uint8, 0, 3),
    "UINT3": ("uint3", np.uint8, 0, 7),
    "UINT4": ("uint4", np.uint8, 0, 15),
    "UINT6": ("uint6", np.uint8, 0, 63),
}


def write(path: Path, values: list[tuple[str, np.ndarray]]) -> list[int]:
    """Write values with Apple's library; their offsets."""
    coremltools()
    from coremltools.libmilstoragepython import _BlobStorageWriter

    writer: Any = _BlobStorageWriter(str(path))
    return [getattr(writer, f"write_{STORED[dtype][0]}_data")(array) for dtype, array in values]


@st.composite
def stored_values(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(STORED)))
    _, numpy_type, low, high = STORED[dtype]
    element = (
        st.floats(low, high, width=32) if dtype == "FLOAT32" else st.integers(int(low), int(high))
    )
    return dtype, draw(hnp.arrays(numpy_type, st.integers(1, 40), elements=element))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.lists(stored_values(), min_size=1, max_size=5))
def test_what_apples_library_writes_is_read_back(
    values: list[tuple[str, np.ndarray]], tmp_path: Path
) -> None:
    offsets = write(tmp_path / "weight.bin", values)
    weights = WeightFile(tmp_path / "weight.bin")
    for offset, (dtype, array) in zip(offsets, values, strict=True):
        read = weights.read(offset, dtype, array.shape)
        expected = array.view(np.float16) if dtype == "FLOAT16" else array
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == expected.dtype


@given(st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_three_bit_values_straddle_bytes_from_the_least_significant_bit(values: list[int]) -> None:
    number = sum(value << (3 * place) for place, value in enumerate(values))
    raw = number.to_bytes(packed_bytes("UINT3", (len(values),)), "little")
    read = unpack(np.frombuffer(raw, np.uint8), "UINT3", (len(values),))
    np.testing.assert_array_equal(read, values)


def test_whole_bytes_are_views_of_the_file_not_copies(tmp_path: Path) -> None:
    (offset,) = write(tmp_path / "weight.bin", [("FLOAT32", np.ones(64, np.float32))])
    assert WeightFile(tmp_path / "weight.bin").read(offset, "FLOAT32", (8, 8)).base is not None


@pytest.fixture
def one_value(tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "weight.bin"
    (offset,) = write(path, [("INT8", np.arange(100, dtype=np.int8))])
    return path, offset


def test_a_file_cut_short_is_refused(one_value: tuple[Path, int]) -> None:
    path, offset = one_value
    raw = path.read_bytes()
    for size, told in ((0, "is empty"), (20, "no header"), (100, "before"), (170, "inside")):
        path.write_bytes(raw[:size])
        with pytest.raises(BundleError, match=told):
            WeightFile(path).read(offset, "INT8", (100,))


def test_an_offset_that_is_no_record_is_refused(one_value: tuple[Path, int]) -> None:
    path, offset = one_value
    with pytest.raises(BundleError, match=f"offset {offset + 64}: there is no value"):
        WeightFile(path).read(offset + 64, "INT8", (20,))


@pytest.mark.parametrize(("dtype", "shape"), [("UINT8", (100,)), ("INT8", (99,)), ("BOOL", (100,))])
def test_a_record_of_another_type_or_size_is_refused(
    dtype: str, shape: tuple[int, ...], one_value: tuple[Path, int]
) -> None:
    path, offset = one_value
    with pytest.raises(BundleError, match=r"stored type|do not hold"):
        WeightFile(path).read(offset, dtype, shape)


def test_another_version_of_the_format_is_refused(one_value: tuple[Path, int]) -> None:
    path, _ = one_value
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 3)
    path.write_bytes(raw)
    with pytest.raises(BundleError, match="version 3; this reader knows 2"):
        WeightFile(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        WeightFile(tmp_path / "weight.bin")
