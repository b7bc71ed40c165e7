"""Damages that files come with: of bytes, of JSON, of safetensors files and of tar files, each drawn from `rng`."""

import copy
import io
import json
import math
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from safetensors.torch import save
from torch import Tensor

DEEP = 100_000
"""Nesting that no parser follows by recursion."""
_ODD_TEXT = ("", " ", "\0", "\x1b[31m", "\u202e", "\xe9", "..", "/", "a/b", "nan", "1e999", "%s{}", "x" * 300)
_ODD_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf)
_ODD: tuple[Any, ...] = (*_ODD_TEXT, *_ODD_NUMBERS, None, True, False, [], {}, [[]], [1, 2, 3], {"": 0}, ["x"])
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_WIDTHS |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "F4": 1}


def odd_value(rng: Random) -> Any:
    """A value that is probably not of the type, or out of the range, that a reader expects."""
    return copy.deepcopy(rng.choice(_ODD))


def damaged(data: bytes, rng: Random) -> bytes:
    """Flip bits, cut, double, drop, zero or overwrite a part."""
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        near = min(at + rng.randrange(1, 40), len(data))
        data = rng.choice(_BYTE_DAMAGES)(data, at, rng.choice((near, near, to)), rng)
    return data


def _flip(data: bytes, at: int, _: int, rng: Random) -> bytes:
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


_BYTE_DAMAGES: tuple[Callable[[bytes, int, int, Random], bytes], ...] = (
    _flip,
    _flip,
    lambda data, at, to, rng: data[:at],
    lambda data, at, to, rng: data[:at] + data[to:],
    lambda data, at, to, rng: data[:to] + data[at:],
    lambda data, at, to, rng: data[:at] + bytes(to - at) + data[to:],
    lambda data, at, to, rng: data[:at] + rng.randbytes(to - at) + data[to:],
    lambda data, at, to, rng: data[:at] + rng.choice((b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"\r", b"\x1a")) + data[at:],
)


def damaged_tree(value: Any, rng: Random) -> Any:
    """Change, drop, double or rename one place of nested dicts and lists; `value` itself is left as it is."""
    root = {"": copy.deepcopy(value)}
    holders: list[Any] = []
    _find_holders(root, holders)
    for _ in range(rng.choice((1, 1, 2, 4))):
        holder = rng.choice(holders)
        if not holder:
            continue
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        action = rng.randrange(8) if holder is not root else 0
        if action < 5:
            holder[key] = odd_value(rng)
        elif action == 5:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[_odd_name(str(key), rng)] = holder.pop(key) if action == 6 else copy.deepcopy(holder[key])
    return root[""]


def _find_holders(value: Any, found: list[Any]) -> None:
    if isinstance(value, dict | list):
        found.append(value)
        for each in value.values() if isinstance(value, dict) else value:
            _find_holders(each, found)


def _odd_name(name: str, rng: Random) -> str:
    at = rng.randrange(len(name) + 1)
    changed = (name[:at], name[at:], name[:at] + rng.choice(_ODD_TEXT) + name[at:], f"{name}_2", f"unet.{name}", "")
    return rng.choice((*changed, name.upper(), name.replace("_", "."), name.replace(".", "_")))


def damaged_json(value: Any, rng: Random) -> bytes:
    """JSON of a damaged tree, of deep nesting, with a doubled key, a lone surrogate, or with damaged bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        opening = rng.choice(("[", '{"a":'))
        return (opening * DEEP).encode()
    text = json.dumps(damaged_tree(value, rng)).encode()
    if kind == 1:
        return damaged(text, rng)
    if kind == 2:
        return text.replace(b'": "', b'": "\\ud800', 1)
    return text


Part = tuple[str, list[int], bytes]
"""The dtype, shape and bytes of a tensor."""


@dataclass
class Weights:
    """The content of a safetensors file, in a form that can be damaged: dtype, shape and bytes of each tensor."""

    tensors: dict[str, Part]
    metadata: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> "Weights":
        """Take the content of a file with these tensors."""
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        (length,) = struct.unpack_from("<Q", data)
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        parts = {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return Weights(parts, dict(metadata or {}))

    def header(self) -> dict[str, Any]:
        """The header that fits the tensors."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return header

    def to_bytes(self, header: bytes | None = None, length: int | None = None) -> bytes:
        """The file; header, length: other ones than those that fit."""
        text = json.dumps(self.header()).encode() if header is None else header
        body = b"".join(data for _, _, data in self.tensors.values())
        return struct.pack("<Q", len(text) if length is None else length) + text + body


def damaged_weights(weights: Weights, rng: Random) -> bytes:
    """A safetensors file whose content, header, length of the header, or bytes are damaged."""
    kind = rng.randrange(10)
    if kind < 6:  # whole as a file: what it holds is odd
        changed = copy.deepcopy(weights)
        for _ in range(rng.choice((1, 1, 2, 5))):
            rng.choice(_WEIGHT_DAMAGES)(changed, rng)
        return changed.to_bytes()
    if kind == 6:
        return weights.to_bytes(damaged_json(weights.header(), rng))
    if kind == 7:
        return weights.to_bytes(length=rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100, 10**8 + 1)))
    if kind == 8:
        text = json.dumps(weights.header())
        return weights.to_bytes(f"{text[:-1]}, {text[1:]}".encode())  # every name twice
    return damaged(weights.to_bytes(), rng)


def _change(weights: Weights, rng: Random, change: Callable[[str, list[int], bytes], Part]) -> None:
    if weights.tensors:
        name = rng.choice(list(weights.tensors))
        weights.tensors[name] = change(*weights.tensors[name])


def _other_dtype(weights: Weights, rng: Random) -> None:
    dtype = rng.choice(list(_WIDTHS))

    def change(_: str, shape: list[int], data: bytes) -> Part:
        count = math.prod(shape) * _WIDTHS[dtype]
        return dtype, shape, (data * (count // max(len(data), 1) + 1))[:count]

    _change(weights, rng, change)


def _other_shape(weights: Weights, rng: Random) -> None:
    def change(dtype: str, shape: list[int], data: bytes) -> Part:
        width = _WIDTHS[dtype]
        count = math.prod(shape)
        other = rng.choice(
            (shape[::-1], [count], [1, *shape], [*shape, 1], [0], [], [0, *shape], shape[:1], [1] * 12, [3])
        )
        size = math.prod(other) * width
        return dtype, other, (data * (size // max(len(data), 1) + 1))[:size].ljust(size, b"\0")

    _change(weights, rng, change)


def _other_numbers(weights: Weights, rng: Random) -> None:
    def change(dtype: str, shape: list[int], data: bytes) -> Part:
        odd = struct.pack("<f", rng.choice((math.nan, math.inf, -1.0, 0.0, 1e38, 1e-45)))
        if dtype == "F64":
            odd = struct.pack("<d", rng.choice((math.nan, math.inf, -1.0, 0.0, 1e300)))
        if dtype.startswith("I"):
            odd = rng.choice((b"\xff", b"\x7f", b"\0")) * 8
        return (
            dtype,
            shape,
            rng.choice(((odd * (len(data) // len(odd) + 1))[: len(data)], odd + data[len(odd) :]))[: len(data)],
        )

    _change(weights, rng, change)


def _other_name(weights: Weights, rng: Random) -> None:
    if weights.tensors:
        name = rng.choice(list(weights.tensors))
        found = weights.tensors[name] if rng.random() < 0.5 else weights.tensors.pop(name)
        weights.tensors[_odd_name(name, rng)] = found


def _no_tensor(weights: Weights, rng: Random) -> None:
    for name in rng.sample(list(weights.tensors), rng.choice((1, 1, len(weights.tensors))) if weights.tensors else 0):
        del weights.tensors[name]


def _exchanged(weights: Weights, rng: Random) -> None:
    names = list(weights.tensors)
    if len(names) > 1:
        one, other = rng.sample(names, 2)
        weights.tensors[one], weights.tensors[other] = weights.tensors[other], weights.tensors[one]


def _other_metadata(weights: Weights, rng: Random) -> None:
    for key in rng.sample(list(weights.metadata), 1) if weights.metadata else []:
        value = weights.metadata[key]
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = value
        text = damaged_json(inner, rng).decode("utf-8", "replace")
        weights.metadata[key] = text if rng.random() < 0.7 else str(odd_value(rng))
        if rng.random() < 0.2:
            weights.metadata[_odd_name(key, rng)] = weights.metadata.pop(key)


_WEIGHT_DAMAGES = (
    _other_dtype, _other_shape, _other_shape, _other_numbers, _other_name, _no_tensor, _exchanged, _other_metadata,
)  # fmt: skip


def odd_caption(rng: Random) -> bytes:
    """The bytes of a caption file."""
    return rng.choice(
        (
            b"", b" \n\t", b"\xff\xfe\x00a", b"\xed\xa0\x80", b"\xef\xbb\xbfa fox", bytes(range(32)), b"a\0b",
            "a\u2028fox\u202e\U0001f98a".encode(), b"word " * 300_000, b"a" * 70_000,
            b"(((" * 1000 + b"a:1.5)", b"\\" * 999,
            b"a fox\r\na dog\x0ca cat\x85", b"(a:1e999) (b:nan) (c:-1) [d] {e|f} embedding:g <lora:h:1>",
        )
    )  # fmt: skip


def damaged_tar(members: Mapping[str, bytes], rng: Random) -> bytes:
    """A tar file with odd members beside the given ones, in an odd order or format, cut, or with damaged bytes."""
    out = io.BytesIO()
    mode = rng.choice(("w", "w", "w:gz", "w:bz2"))
    items = list(members.items())
    if rng.random() < 0.3:
        rng.shuffle(items)
    with tarfile.open(fileobj=out, mode=mode, format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))) as tar:  # type: ignore[call-overload]
        for name, data in items:
            for each in (tarfile.TarInfo(name), *odd_members(name, rng)):
                each.size = len(data) if each.isreg() else 0
                tar.addfile(each, io.BytesIO(data) if each.isreg() else None)
    data = out.getvalue()
    if rng.random() < 0.5:
        return damaged(data, rng)
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    return data


def odd_members(name: str, rng: Random) -> list[tarfile.TarInfo]:
    """Sometimes a member that is a link or a device, leads out of the folder, or has an odd name."""
    if rng.random() < 0.7:
        return []
    odd = rng.choice(
        (f"/etc/{name}", f"../../{name}", f"./{name}", "", ".", "a" * 90, f"\xe9/{name}", name.replace(".", ".."))
    )
    member = tarfile.TarInfo(odd)
    kinds = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    member.type = rng.choice((*kinds, tarfile.CONTTYPE, b"Z"))
    member.linkname = rng.choice(("", "/etc/passwd", name, "gone.png", "../.."))
    return [member]
