"""An ONNX file's bytes, changed without the onnx library: Protocol Buffers' wire format.

In onnx.proto: ModelProto.graph is field 7; GraphProto.node 1, initializer 5, input 11, output 12;
NodeProto.input 1, output 2, op_type 4; TensorProto.data_type 2, name 8; ValueInfoProto.name 1, type
2; TypeProto.tensor_type 1, with elem_type 1 and shape 2; TensorShapeProto.dim 1, with dim_value 1.
See protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GRAPH, NODE, INITIALIZER, INPUT, OUTPUT, NAME = 7, 1, 5, 11, 12, 1
NODE_INPUT, NODE_OUTPUT, NODE_OP = 1, 2, 4
TENSOR_DTYPE, TENSOR_NAME = 2, 8
VALUE_TYPE, TYPE_TENSOR, TYPE_ELEMENT, TYPE_SHAPE, SHAPE_DIM, DIM_VALUE = 2, 1, 1, 2, 1, 1
DTYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16"}
"""Those of a manifest's tensors, by TensorProto.DataType."""
INT8 = 3
LONGEST_BITS = 70
"""Of a number on the wire: ten bytes of seven."""
Form = tuple[str | None, tuple[int | None, ...] | None]
"""A tensor's dtype and shape; None where the file tells none."""


@dataclass(frozen=True)
class Declared:
    """What an ONNX file says of itself.

    inputs, outputs: by name. int8_weights: the INT8 initializers that a DequantizeLinear reads.
    """

    inputs: dict[str, Form]
    outputs: dict[str, Form]
    int8_weights: int


def declared(model: bytes | memoryview) -> Declared:
    """Raises ValueError for bytes that are no model. A runtime mends what it can, and hides it."""
    inputs, outputs = dict[str, Form](), dict[str, Form]()
    int8, read = set[str](), set[str]()
    for number, content, _ in _fields(memoryview(model)):
        if number != GRAPH:
            continue
        for own, part, _ in _fields(content):
            if own in (INPUT, OUTPUT):
                name, form = _form(part)
                (inputs if own == INPUT else outputs)[name] = form
            elif own == INITIALIZER:
                if _numbers(part, TENSOR_DTYPE) == [INT8]:
                    int8 |= _names(part, TENSOR_NAME)
            elif own == NODE and _names(part, NODE_OP) == {"DequantizeLinear"}:
                read |= set(_text(part, NODE_INPUT)[:1])
    return Declared(inputs, outputs, len(int8 & read))


def _form(value: memoryview) -> tuple[str, Form]:
    """A ValueInfoProto's name, and its dtype and shape."""
    dtype, shape = None, None
    for kind in _parts(value, VALUE_TYPE):
        for tensor in _parts(kind, TYPE_TENSOR):
            dtype = next((DTYPES.get(one) for one in _numbers(tensor, TYPE_ELEMENT)), None)
            for dims in _parts(tensor, TYPE_SHAPE):
                shape = tuple(
                    next(iter(_numbers(dim, DIM_VALUE)), None) for dim in _parts(dims, SHAPE_DIM)
                )
    return "".join(_text(value, NAME)), (dtype, shape)


def more_outputs(names: Sequence[str]) -> bytes:
    """What makes values of a model its outputs, put behind the model's bytes.

    Protocol Buffers merge messages that stand one after the other, and add up repeated fields.
    """
    return _field(GRAPH, b"".join(_output(name) for name in names))


def computed(model: bytes) -> set[str]:
    """The names of all values that a model's nodes compute."""
    return {
        name
        for number, content, _ in _fields(memoryview(model))
        if number == GRAPH
        for own, node, _ in _fields(content)
        if own == NODE
        for name in _names(node, NODE_OUTPUT)
    }


def cut(model: bytes, names: Sequence[str]) -> bytes:
    """The model as far as it takes to compute some of its values, which are then its outputs.

    Raises ValueError for bytes that are no model.
    """
    outside, nodes, inside = [], [], []
    for number, content, whole in _fields(memoryview(model)):
        if number != GRAPH:
            outside.append(whole)
            continue
        for own, part, entry in _fields(content):
            if own == NODE:
                nodes.append((entry, _names(part, NODE_INPUT), _names(part, NODE_OUTPUT)))
            elif own != OUTPUT:
                inside.append(entry)
    needed, kept = set(names), []
    for entry, inputs, outputs in reversed(nodes):
        if not needed.isdisjoint(outputs):
            needed |= inputs
            kept.append(entry)
    graph = b"".join([*reversed(kept), *inside, *map(_output, names)])
    return b"".join([*outside, _field(GRAPH, graph)])


def _parts(message: memoryview, field: int) -> list[memoryview]:
    return [part for number, part, _ in _fields(message) if number == field]


def _numbers(message: memoryview, field: int) -> list[int]:
    return [_read_varint(part, 0)[0] for part in _parts(message, field)]


def _text(message: memoryview, field: int) -> list[str]:
    return [bytes(part).decode() for part in _parts(message, field)]


def _names(node: memoryview, field: int) -> set[str]:
    return set(_text(node, field)) - {""}


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Each field's number, its content, and all of it with its tag."""
    at = 0
    while at < len(message):
        tag, start = _read_varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, start = _read_varint(message, start)
            end = start + size
        elif kind == 0:
            end = _read_varint(message, start)[1]
        elif kind in (1, 5):
            end = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if end > len(message):
            raise ValueError("cut short")
        yield tag >> 3, message[start:end], message[at:end]
        at = end


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = shift = 0
    while at < len(message):
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > LONGEST_BITS:
            raise ValueError("a number of more than ten bytes")
        if byte < 0x80:
            return number, at
    raise ValueError("cut short")


def _output(name: str) -> bytes:
    return _field(OUTPUT, _field(NAME, name.encode()))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low = number & 0x7F
    return bytes([low]) if number < 0x80 else bytes([low | 0x80]) + _varint(number >> 7)
