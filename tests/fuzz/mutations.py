"""How valid files are spoilt. Every choice is drawn from a ``Random``, so that a seed, or hypothesis, decides the whole case."""

import json
import re
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import yaml

Mutator = Callable[[Random, bytes], bytes]

INTEGERS = (0, 1, 2, -1, -2, 3, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *INTEGERS,
    *(2**63, 10**30, 10**4000, 0.0, -0.0, -1.5, 0.1, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(True, False, None, "", "x", "\0", "a\0b", "../../etc/passwd", "/etc/passwd", "\ud800", "\u202e", "1", "1e9", "nan", "x" * 300),
    *([], {}, [[]], [0], [-1], ["x"], {"": 0}, {"x": {}}, [None], [1, 2, 3], [0.5, "a"]),
)
"""What may stand in the place of any value of a structure."""
BYTES = (
    b"\0",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\n\n",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b"- ",
    b": ",
    b"&a ",
    b"*a",
    b"!!x ",
    b"%",
)
NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
DEEP = 3000
"""Levels of nesting that a recursive reader does not survive."""


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """One to four edits that know nothing of the format."""
    for _ in range(random.randint(1, 4)):
        content = random.choice(_EDITS)(random, content)
    return content


def mutate_json(random: Random, content: bytes) -> bytes:
    """Edits of the structure, or now and then of the bytes."""
    if random.random() < 0.25:
        return mutate_bytes(random, content)
    return json.dumps(_mutated(random, json.loads(content))).encode()


def mutate_json_lines(random: Random, content: bytes) -> bytes:
    """As ``mutate_json`` of one line; or lines removed, repeated and exchanged."""
    lines = content.splitlines(keepends=True)
    if random.random() < 0.2:
        return b"".join(random.choice(lines) for _ in range(random.randint(0, 2 * len(lines))))
    at = random.randrange(len(lines))
    lines[at] = mutate_json(random, lines[at].rstrip(b"\n")) + b"\n" * random.randint(0, 2)
    return b"".join(lines)


def mutate_yaml(random: Random, content: bytes) -> bytes:
    """As ``mutate_json``, of a YAML file."""
    if random.random() < 0.4:
        return mutate_bytes(random, content)
    values = _mutated(random, yaml.safe_load(content))
    return yaml.safe_dump(values, default_flow_style=random.random() < 0.5).encode("utf-8", "surrogatepass")


def mutate_table(random: Random, content: bytes) -> bytes:
    """Edits of single numbers and of bytes."""
    return _number(random, content) if random.random() < 0.5 else mutate_bytes(random, content)


def mutate_safetensors(random: Random, content: bytes) -> bytes:
    """Edits of the JSON header under its right length, of its length, or of the bytes."""
    size = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + size], content[8 + size :]
    if random.random() < 0.7:
        header = mutate_json(random, header)
        return len(header).to_bytes(8, "little") + header + values
    if random.random() < 0.3:
        return struct.pack("<Q", random.choice(INTEGERS) % 2**64) + content[8:]
    return mutate_bytes(random, content)


def structures(random: Random, values: Any) -> Any:
    """``values`` with one to three nodes replaced, removed, repeated or moved."""
    return _mutated(random, values)


def _mutated(random: Random, values: Any) -> Any:
    root = [values]
    for _ in range(random.randint(1, 3)):
        owner, key = _place(random, root)
        random.choice(_STRUCTURE_EDITS)(random, owner, key)
        if not root:
            root = [None]
    return root[0]


def _place(random: Random, root: list[Any]) -> tuple[Any, Any]:
    """A container and a key or index in it, at any depth."""
    owner, key = root, 0
    while isinstance(owner[key], list | dict) and owner[key] and random.random() < 0.8:
        owner = owner[key]
        key = random.choice(sorted(owner, key=str)) if isinstance(owner, dict) else random.randrange(len(owner))
    return owner, key


def _replace(random: Random, owner: Any, key: Any) -> None:
    owner[key] = deepcopy(random.choice(VALUES))


def _shift(random: Random, owner: Any, key: Any) -> None:
    if isinstance(owner[key], int | float) and abs(owner[key]) < 2**64:
        owner[key] = random.choice((-owner[key], owner[key] + 1, owner[key] - 1, owner[key] * 2, owner[key] + 0.5, str(owner[key])))
    elif isinstance(owner[key], str):
        owner[key] = random.choice(
            (owner[key][1:], owner[key] + "x", owner[key].upper(), f"../{owner[key]}", f"/{owner[key]}", owner[key] * 3)
        )


def _remove(random: Random, owner: Any, key: Any) -> None:
    del owner[key]


def _add(random: Random, owner: Any, key: Any) -> None:
    value = deepcopy(random.choice((*VALUES, owner[key])))
    if isinstance(owner, dict):
        owner[random.choice((f"{key}x", "", "format", "..", str(key).upper()))] = value
    elif len(owner) < 1000:
        owner.insert(key, value)


def _wrap(random: Random, owner: Any, key: Any) -> None:
    owner[key] = random.choice(([owner[key]], {str(key): owner[key]}))


def _exchange(random: Random, owner: Any, key: Any) -> None:
    other = random.choice(sorted(owner, key=str)) if isinstance(owner, dict) else random.randrange(len(owner))
    owner[key], owner[other] = owner[other], owner[key]


_STRUCTURE_EDITS = (_replace, _replace, _replace, _shift, _shift, _remove, _add, _wrap, _exchange)


def _flip(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + bytes(each ^ 1 << random.randrange(8) for each in content[at : at + 1]) + content[at + 1 :]


def _set(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + bytes([random.randrange(256)]) + content[at + 1 :]


def _truncate(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _insert(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + random.choice(BYTES) * random.choice((1, 1, 1, 2, 9)) + content[at:]


def _repeat(random: Random, content: bytes) -> bytes:
    begin = random.randrange(len(content) + 1)
    end = min(len(content), begin + random.choice((1, 8, 64, 4096)))
    return content[:end] + content[begin:end] * random.choice((1, 2, 5)) + content[end:]


def _delete(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + content[at + random.choice((1, 4, 8, 64)) :]


def _binary(random: Random, content: bytes) -> bytes:
    """An extreme little-endian integer over some bytes."""
    width, at = random.choice((1, 2, 4, 8)), random.randrange(len(content) + 1)
    at -= at % random.choice((1, width))
    return content[:at] + (random.choice(INTEGERS) % 256**width).to_bytes(width, "little") + content[at + width :]


def _number(random: Random, content: bytes) -> bytes:
    """An extreme number in place of one in the text."""
    found = list(NUMBER.finditer(content[: 1 << 16]))
    if not found:
        return _set(random, content)
    match = random.choice(found)
    new = random.choice([str(each).encode() for each in VALUES if isinstance(each, float) or (type(each) is int and abs(each) < 10**40)])
    return content[: match.start()] + new + content[match.end() :]


def _nest(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return content[:at] + opening * DEEP + b"0" + closing * random.choice((0, DEEP)) + content[at:]


_EDITS = (_flip, _flip, _set, _set, _truncate, _insert, _insert, _repeat, _delete, _binary, _binary, _number, _number, _nest)
