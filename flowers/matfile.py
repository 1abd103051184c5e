"""MATLAB's files, read without scipy.

scipy's reader ends the process, with no exception to catch, at about one damaged file in a hundred.

Source: MathWorks, MAT-File Format (Level 5), R2024b. A file is a header of 128 bytes and a row of
elements. An element is a tag (data type and number of bytes, 4 bytes each), its data, and padding
up to a multiple of 8 bytes. Data of at most 4 bytes stand within the tag itself. A matrix is an
element whose data are elements again; a compressed matrix is zlib data that unpack to one.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# The most that labels, splits or captions may take once unpacked, in bytes. No dataset of flowers
# needs as much: a file that claims more is damaged, or made to fill the memory.
MOST_BYTES = 1 << 26

HEADER_SIZE = 128
# The last two bytes of the header are the characters MI, written as a number of two bytes.
BYTE_ORDERS = {b"IM": "<", b"MI": ">"}

# Data types of elements: miMATRIX, miCOMPRESSED, and the numbers as numpy calls them.
MATRIX = 14
COMPRESSED = 15
NUMBER_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
# Classes of a matrix: mxDOUBLE_CLASS to mxUINT64_CLASS. Others are cells, structures and text.
NUMERIC_CLASSES = range(6, 16)


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The real numeric matrices of a MATLAB 5 file, by name.

    Raises ValueError, struct.error or zlib.error if the file is damaged, as far as that shows:
    compressed matrices have a checksum, others have none.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("no MATLAB 5 file")
    data = path.read_bytes()
    order = BYTE_ORDERS.get(data[HEADER_SIZE - 2 : HEADER_SIZE])
    if order is None:
        raise ValueError("no MATLAB 5 file")

    matrices = {}
    budget = MOST_BYTES  # for all compressed elements together
    for data_type, content in _iterate_elements(data[HEADER_SIZE:], order):
        if data_type == COMPRESSED:
            unpacked = _unpack(content, budget)
            budget -= len(unpacked)
            # What is compressed is one element. The next is not looked at.
            data_type, content = next(_iterate_elements(unpacked, order), (0, b""))
        if data_type == MATRIX:
            matrices.update(_read_matrix(content, order))
    return matrices


def _iterate_elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Data type and data of each element. Raises ValueError if one is longer than what is left."""
    start = 0
    while start < len(data):
        data_type, size = struct.unpack_from(order + "II", data, start)
        # A small element has its size in the upper half of the data type, and its data where other
        # elements have the size: 8 bytes together.
        small_size = data_type >> 16
        if small_size:
            data_type, size = data_type & 0xFFFF, small_size
            start += 4
            available = 4
            step = 4
        else:
            start += 8
            available = len(data) - start
            padding = 0 if data_type == COMPRESSED else -size % 8
            step = size + padding
        if size > available:
            raise ValueError("cut off")
        yield data_type, data[start : start + size]
        start += step


def _unpack(data: bytes, budget: int) -> bytes:
    """Decompress at most `budget` bytes. Raises ValueError if there is more, or it is cut off."""
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, budget)
    # `eof` is set once the checksum at the end has been read and compared.
    if not unpacker.eof or len(unpacked) >= budget:
        raise ValueError("cut off, or too large")
    return unpacked


def _read_matrix(data: bytes, order: str) -> dict[str, np.ndarray]:
    """Name and values of a numeric matrix; an empty dict for cells, structures and text."""
    # A matrix is flags (8 bytes, the class in the lowest byte of the first number), shape, name,
    # real part and perhaps an imaginary part. Missing elements count as empty.
    elements = list(_iterate_elements(data, order))
    elements += [(0, b"")] * 4
    (_, flags), (_, shape), (_, name), (data_type, values) = elements[:4]

    if len(flags) != 8:
        return {}
    matrix_class = struct.unpack(order + "II", flags)[0] & 0xFF
    if matrix_class not in NUMERIC_CLASSES:
        return {}

    # The numbers may be stored in a smaller type than that of the class.
    if data_type not in NUMBER_TYPES:
        raise ValueError(f"no numbers: data type {data_type}")
    numbers = np.frombuffer(values, order + NUMBER_TYPES[data_type])
    dimensions = np.frombuffer(shape, order + "i4").tolist()
    return {name.decode("ascii"): numbers.reshape(dimensions, order="F")}  # column by column
