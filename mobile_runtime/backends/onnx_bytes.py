"""An ONNX file's bytes, changed without the onnx library: Protocol Buffers' wire format.

In onnx.proto: ModelProto.graph is field 7; GraphProto.node 1, GraphProto.output 12; NodeProto.input
1, NodeProto.output 2; ValueInfoProto.name 1. See protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator, Sequence

GRAPH, NODE, OUTPUT, NAME = 7, 1, 12, 1
NODE_INPUT, NODE_OUTPUT = 1, 2


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


def _names(node: memoryview, field: int) -> set[str]:
    return {bytes(part).decode() for number, part, _ in _fields(node) if number == field} - {""}


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
