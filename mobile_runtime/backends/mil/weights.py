"""The file of stored weights of an ML program (`weights/weight.bin`), read without coremltools.

The format, version 2 ("MIL blob storage"; all integers little-endian):

    header, 64 bytes:   uint32 count, uint32 version, zeros
    record, 64 bytes:   uint32 0xDEADBEEF, uint32 type, uint64 bytes, uint64 offset,
                        uint64 padding in bits, zeros
    data:               at the record's offset (from the start of the file), dense, row-major

A program names a value by the offset of its record. Types narrower than a byte are packed from
the least significant bit up, an element may straddle two bytes, and the last byte is padded.
"""

import mmap
import struct
from pathlib import Path

import numpy as np

from mobile_runtime.errors import BundleError

SENTINEL = 0xDEADBEEF
VERSION = 2
HEADER_BYTES = 64
RECORD = struct.Struct("<IIQQQ")

# The storage format's own number of each type, by MIL's name for it.
STORED_TYPES = {
    "FLOAT16": 1,
    "FLOAT32": 2,
    "UINT8": 3,
    "INT8": 4,
    "INT16": 6,
    "UINT16": 7,
    "INT4": 8,
    "UINT1": 9,
    "UINT2": 10,
    "UINT4": 11,
    "UINT3": 12,
    "UINT6": 13,
    "INT32": 14,
    "UINT32": 15,
}

# numpy's type and the number of bits of an element, by MIL's name. Types narrower than a byte
# are held one element a byte.
NUMPY_TYPES = {
    "BOOL": (np.dtype(np.bool_), 8),
    "FLOAT16": (np.dtype(np.float16), 16),
    "FLOAT32": (np.dtype(np.float32), 32),
    "FLOAT64": (np.dtype(np.float64), 64),
    "INT4": (np.dtype(np.int8), 4),
    "INT8": (np.dtype(np.int8), 8),
    "INT16": (np.dtype(np.int16), 16),
    "INT32": (np.dtype(np.int32), 32),
    "INT64": (np.dtype(np.int64), 64),
    "UINT1": (np.dtype(np.uint8), 1),
    "UINT2": (np.dtype(np.uint8), 2),
    "UINT3": (np.dtype(np.uint8), 3),
    "UINT4": (np.dtype(np.uint8), 4),
    "UINT6": (np.dtype(np.uint8), 6),
    "UINT8": (np.dtype(np.uint8), 8),
    "UINT16": (np.dtype(np.uint16), 16),
    "UINT32": (np.dtype(np.uint32), 32),
    "UINT64": (np.dtype(np.uint64), 64),
}


class WeightFile:
    """A mapped weight file. Arrays of whole-byte types are views of the mapping: no copy."""

    def __init__(self, path: Path) -> None:
        """Map the file; raises BundleError when it is missing, cut short, or of another format."""
        self.path = path
        try:
            with path.open("rb") as stream:
                # Copy-on-write, because torch warns of arrays that cannot be written.
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # mmap refuses an empty file
            raise BundleError(f"{path} is empty; make the bundle again") from error
        if len(self._data) < HEADER_BYTES:
            raise BundleError(f"{path} is cut short: it has no header; make the bundle again")
        _, version = struct.unpack_from("<II", self._data)
        if version != VERSION:
            raise BundleError(
                f"{path} is a weight file of version {version}; this reader knows {VERSION}"
            )

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The value whose record is at `offset`, which the program declares as dtype and shape.

        Raises BundleError when the record is no record, says another type or size, or points
        behind the end of the file.
        """
        raw = self.check(offset, dtype, shape)
        return unpack(raw, dtype, shape)

    def check(self, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes of a value, (size,) uint8, once its record agrees with the program."""
        where = f"{self.path}, offset {offset}"
        if offset + HEADER_BYTES > len(self._data):
            raise BundleError(f"{where}: the file ends before this value; make the bundle again")
        sentinel, stored, size, start, _ = RECORD.unpack_from(self._data, offset)
        if sentinel != SENTINEL:
            raise BundleError(f"{where}: there is no value here; make the bundle again")
        if dtype not in STORED_TYPES or stored != STORED_TYPES[dtype]:
            raise BundleError(f"{where}: stored type {stored} is not the declared {dtype}")
        if size != packed_bytes(dtype, shape):
            raise BundleError(f"{where}: {size} bytes do not hold {dtype} of shape {shape}")
        if start + size > len(self._data):
            raise BundleError(f"{where}: the file ends inside this value; make the bundle again")
        return np.frombuffer(self._data, np.uint8, size, start)


def packed_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes hold a dense value of this type and shape."""
    elements = int(np.prod(shape, dtype=np.int64))
    return (elements * NUMPY_TYPES[dtype][1] + 7) // 8


def unpack(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Stored bytes as an array; types narrower than a byte get one byte an element.

    raw: (bytes,) uint8, as `packed_bytes` counts them. INT4 is two's complement.
    """
    numpy_type, bits = NUMPY_TYPES[dtype]
    if bits >= 8:
        return raw.view(numpy_type).reshape(shape)
    elements = int(np.prod(shape, dtype=np.int64))
    by_element = np.unpackbits(raw, count=elements * bits, bitorder="little").reshape(-1, bits)
    values = np.packbits(by_element, axis=1, bitorder="little")[:, 0].reshape(shape)
    if dtype == "INT4":
        return ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values
