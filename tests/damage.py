"""Damaged inputs, the same ones every time: number i of a reader depends on its name and i alone.

The random numbers must be drawn in the same order, or the inputs are others.
"""

import json
import random
import re

# Values that take the place of one in a JSON file.
STRANGE = [
    *(None, True, -1, 0, 2.5, 10**30, 1e308, float("nan"), float("inf")),
    *("", "text", "1", "\x00", "é\u202e😀", "a" * 5000),
    *([], {}, [[]], {"a": 1}, [None] * 100),
]
# Other files altogether.
FOREIGN = [
    b"",
    b"\x00" * 1000,
    b"\xff\xfe\x00t\x00e",
    b"hello",
    b"{}",
    b"[]",
    b"null",
    b"7",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'"' + b"9" * 10_000,
    b"9" * 10_000,
    b"PK\x03\x04" + b"\x00" * 60,
    b"PK\x05\x06" + b"\x00" * 18,
    b"\x93NUMPY\x01\x00",
    b"\x80\x04.",
    b"\x80\x02csomething\nelse\n.",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xd9",
    b"\x1f\x8b\x08\x00",
    b"<html>",
    b"a,b,c\n1,2,3\n",
    b"\n" * 1000,
]
# Four bytes of a huge or negative number, in both byte orders.
SIZES = [
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00" * 4,
    b"\x80\x00\x00\x00",
]
NUMBERS = [
    *(b"-1", b"0", b"999999999999999999999", b"1e999", b"-1e-999", b"nan", b"NaN", b"Infinity"),
    *(b"0.5", b"1" * 5000, b"0x10", b"\xd9\xa3", b"true", b""),
]
WORDS = [
    *(b"\xff\xfe", b"\xc3", b'"', b",", b"\r", b"\x00", b"\\"),
    *(b"a" * 200_000, b"[" * 20_000, b""),
]
KEYS = ["", "0", "-1", "999", "1e3"]


def damaged(name: str, i: int, data: bytes, text: bool = False) -> bytes:
    """`data` after one to three mutations; now and then another file altogether. Number 0 is whole.

    Bytes are mutated, and where it is text its lines, words and JSON too.
    """
    rng = random.Random(f"{name} {i}")
    if i == 0:
        return data
    if rng.random() < 0.04:
        return rng.choice(FOREIGN)
    kinds = [cut, flip, noise, insert, remove, duplicate, zeros, swap, header, header]
    if text:
        kinds += 2 * [lines, numbers, words]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if text and rng.random() < 0.4:
            data = json_node(data, rng)
        else:
            mutate = rng.choice(kinds)
            data = mutate(data, rng)
    return data


# -----------------------------------------------------------------------------
# mutations of bytes


def block(data: bytes, rng: random.Random) -> tuple[int, int]:
    """The start and the end of a block, short ones more often."""
    start = rng.randrange(len(data) + 1)
    length = int(2 ** rng.uniform(0, 12))
    return start, min(len(data), start + length)


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def flip_bit(out, position, rng):
    out[position] ^= 1 << rng.randrange(8)


def flip(data, rng):
    """A few bits, anywhere."""
    out = bytearray(data)
    if data:
        for _ in range(rng.choice([1, 1, 3, 30])):
            flip_bit(out, rng.randrange(len(out)), rng)
    return bytes(out)


def header(data, rng):
    """A bit or a number near the start or the end, where formats say what they hold."""
    out = bytearray(data)
    if rng.random() < 0.7:
        position = rng.randrange(200)
    else:
        position = max(0, len(data) - 1 - rng.randrange(300))
    if position < len(out) and rng.random() < 0.5:
        flip_bit(out, position, rng)
    else:
        out[position : position + 4] = rng.choice(SIZES)
    return bytes(out)


def noise(data, rng):
    start, end = block(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def insert(data, rng):
    start, end = block(data, rng)
    return data[:start] + rng.randbytes(max(1, end - start)) + data[start:]


def remove(data, rng):
    start, end = block(data, rng)
    return data[:start] + data[end:]


def duplicate(data, rng):
    start, end = block(data, rng)
    return data[:end] + data[start:]


def zeros(data, rng):
    start, end = block(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def swap(data, rng):
    """Two blocks change places."""
    (a, b), (c, d) = sorted([block(data, rng), block(data, rng)])
    b = min(b, c)  # they may not overlap
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


# -----------------------------------------------------------------------------
# mutations of text


def lines(data, rng):
    """Lines swapped, repeated, dropped, or joined."""
    rows = data.split(b"\n")
    i = rng.randrange(len(rows))
    j = rng.randrange(len(rows))
    how = rng.randrange(4)
    if how == 0:
        rows[i], rows[j] = rows[j], rows[i]
    elif how == 1:
        rows.insert(j, rows[i])
    elif how == 2:
        del rows[i]
    else:
        rows[i : i + 2] = [b"".join(rows[i : i + 2])]
    return b"\n".join(rows)


def numbers(data, rng):
    """One number becomes another, or none at all."""
    matches = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not matches:
        return data
    match = rng.choice(matches)
    return data[: match.start()] + rng.choice(NUMBERS) + data[match.end() :]


def words(data, rng):
    """One word becomes another of the file, or what is no UTF-8."""
    matches = list(re.finditer(rb"\w+", data))
    if not matches:
        return data
    match = rng.choice(matches)
    another = rng.choice(matches)[0]
    return data[: match.start()] + rng.choice([another, *WORDS]) + data[match.end() :]


def json_node(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, or one line of it, of which a value or key is replaced, dropped or moved.

    Any other file stays as it is.
    """
    rows = [data]
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        rows = data.split(b"\n")
    i = rng.randrange(len(rows))
    try:
        value = json.loads(rows[i])
        rows[i] = json.dumps(_strange(value, rng)).encode()
    except (ValueError, RecursionError):
        return data
    return b"\n".join(rows)


def _strange(value, rng):
    """The value with something strange in it, or something strange in its place."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(STRANGE)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    how = rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.3:
        value[rng.choice(keys)] = value[key]
    elif how < 0.4:
        if isinstance(value, dict):
            new_key = rng.choice([*KEYS, key.upper() + " ", "é"])
            value[new_key] = value.pop(key)
        else:
            value.insert(rng.randrange(len(value)), value[key])
    else:
        value[key] = _strange(value[key], rng)
    return value
