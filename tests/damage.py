"""Damaged inputs, the same ones every time: number i of a reader depends on the reader's name and i alone."""

import json
import random
import re

STRANGE = [
    None,
    True,
    -1,
    0,
    2.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "text",
    "1",
    "\x00",
    "é\u202e😀",
    "a" * 5000,
    [],
    {},
    [[]],
    {"a": 1},
    [None] * 100,
]
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


def damaged(name: str, i: int, data: bytes, text: bool = False) -> bytes:
    """`data` after one to three mutations of its bytes, or of its JSON and lines where it is text; now and then another file altogether. Number 0 is whole."""
    rng = random.Random(f"{name} {i}")
    if not i:
        return data
    if rng.random() < 0.04:
        return rng.choice(FOREIGN)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kinds = (
            [cut, flip, noise, insert, remove, duplicate, zeros, swap]
            + 2 * [header]
            + 2 * text * [lines, numbers, words]
        )
        data = json_node(data, rng) if text and rng.random() < 0.4 else rng.choice(kinds)(data, rng)
    return data


def span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """A place and the end of a block, short ones more often."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def flip(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30]) if data else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def header(data, rng):
    """A bit, or four bytes of a huge or negative number, near the start or the end, where formats say what they hold."""
    out, at = (
        bytearray(data),
        rng.randrange(200) if rng.random() < 0.7 else max(0, len(data) - 1 - rng.randrange(300)),
    )
    if at < len(out) and rng.random() < 0.5:
        out[at] ^= 1 << rng.randrange(8)
    else:
        out[at : at + 4] = rng.choice(
            [
                b"\xff" * 4,
                b"\x7f\xff\xff\xff",
                b"\xff\xff\xff\x7f",
                b"\x00" * 4,
                b"\x80\x00\x00\x00",
            ]
        )
    return bytes(out)


def noise(data, rng):
    start, end = span(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def insert(data, rng):
    start, end = span(data, rng)
    return data[:start] + rng.randbytes(max(1, end - start)) + data[start:]


def remove(data, rng):
    start, end = span(data, rng)
    return data[:start] + data[end:]


def duplicate(data, rng):
    start, end = span(data, rng)
    return data[:end] + data[start:]


def zeros(data, rng):
    start, end = span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def swap(data, rng):
    (a, b), (c, d) = sorted([span(data, rng), span(data, rng)])
    b = min(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def lines(data, rng):
    """Lines swapped, repeated, dropped, or joined."""
    rows = data.split(b"\n")
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
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
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return data
    place = rng.choice(found)
    other = rng.choice(
        [
            b"-1",
            b"0",
            b"999999999999999999999",
            b"1e999",
            b"-1e-999",
            b"nan",
            b"NaN",
            b"Infinity",
            b"0.5",
            b"1" * 5000,
            b"0x10",
            b"\xd9\xa3",
            b"true",
            b"",
        ]
    )
    return data[: place.start()] + other + data[place.end() :]


def words(data, rng):
    """One word becomes another, or what is no UTF-8."""
    found = list(re.finditer(rb"\w+", data))
    if not found:
        return data
    place = rng.choice(found)
    other = rng.choice(
        [
            rng.choice(found)[0],
            b"\xff\xfe",
            b"\xc3",
            b'"',
            b",",
            b"\r",
            b"\x00",
            b"\\",
            b"a" * 200_000,
            b"[" * 20_000,
            b"",
        ]
    )
    return data[: place.start()] + other + data[place.end() :]


def json_node(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, or one line of it, of which a value or key is replaced, dropped or moved; any other file as it is."""
    rows = [data]
    try:
        value = json.loads(data)
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
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(STRANGE)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    how = rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.3:
        value[rng.choice(keys)] = value[key]
    elif how < 0.4 and isinstance(value, dict):
        value[rng.choice(["", "0", "-1", "999", "1e3", key.upper() + " ", "é"])] = value.pop(key)
    elif how < 0.4:
        value.insert(rng.randrange(len(value)), value[key])
    else:
        value[key] = _strange(value[key], rng)
    return value
