"""Checkpoints that are damaged in every way: what a download, a full disk or an attacker makes of them."""

import argparse
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import litconvert
from litconvert.conversion.relayout import write_layout
from litconvert.families.sources import open_source
from litconvert.recipe.schema import Source
from tests.helpers.checkpoint_files import dit_state

# Reading every case and converting one in so many.
CONVERTED = 8


STEM = "diffusion_pytorch_model"


HEADS = "num_attention_heads"


@dataclass(frozen=True)
class Form:
    """A checkpoint as files.

    Attributes:
        files: content by name.
        entry: the file to open; empty for their folder.
        damaged: the file that is damaged.
        heads: the hint that it needs.
        one_set: it holds one set of weights, or its moving average under `ema`.
    """

    files: dict[str, bytes]
    entry: str
    damaged: str
    heads: int | None = 2
    one_set: bool = True

    def with_content(self, content: bytes, name: str | None = None) -> "Form":
        return replace(self, files={**self.files, name or self.damaged: content})

    @property
    def content(self) -> bytes:
        return self.files[self.damaged]


Cases = Iterator[tuple[str, Form]]


def saved(content: object, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sound_forms(folder: Path) -> dict[str, Form]:
    """One small DiT in every form that is read."""
    state = dit_state(width=16, layers=1, rows=3)
    folder.mkdir()
    plain = folder / "plain.pt"
    plain.write_bytes(saved(state))
    opened = open_source(Source(path=str(plain), num_attention_heads=2))
    write_layout(opened, folder / "original.safetensors", "original")
    write_layout(opened, folder / "diffusers", "diffusers")
    write_layout(opened, folder / "shards", "diffusers", max_shard_bytes=30_000)
    hints = ["source.num_attention_heads=2", "student.num_attention_heads=2", "solve=null"]
    litconvert.convert(plain, folder / "student", None, hints)
    training = {"model": state, "ema": state, "opt": {"step": 3}, "args": argparse.Namespace(model="DiT", lr=1e-4)}
    shards, name = files_of(folder / "shards"), "a.safetensors"
    wrapped = {f"net._orig_mod.module.{key}": value for key, value in state.items()}
    return {
        "safetensors": Form({name: (folder / "original.safetensors").read_bytes()}, name, name),
        "zip": Form({"a.pt": plain.read_bytes()}, "a.pt", "a.pt"),
        "training": Form({"a.pt": saved(training)}, "a.pt", "a.pt"),
        "legacy": Form({"a.pt": saved(state, legacy=True)}, "a.pt", "a.pt"),
        "wrapped, of another kind than its name": Form({"a.bin": save(wrapped)}, "a.bin", "a.bin"),
        "averages": Form({"a.ckpt": saved(averages(state))}, "a.ckpt", "a.ckpt"),
        "diffusers": Form(files_of(folder / "diffusers"), "", f"{STEM}.safetensors", None),
        "shards": Form(shards, "", min(name for name in shards if name.endswith(".safetensors")), None),
        "student": Form(files_of(folder / "student"), "", f"{STEM}.safetensors", None),
    }


def averages(state: Mapping[str, torch.Tensor], shadow: object = None) -> dict[str, Any]:
    """A training checkpoint as an EMA object leaves it: the parameters in a list, the buffers in the model alone."""
    parameters = [value for key, value in state.items() if key != "pos_embed"]
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": parameters if shadow is None else shadow}
    return {"state_dict": {f"model.diffusion_model.{key}": value for key, value in state.items()}, "ema_state": ema}


def rewritten_sets(form: Form) -> Cases:
    """Sets of weights beside, within and instead of one another."""
    state, form = torch.load(io.BytesIO(form.content), weights_only=True), replace(form, one_set=False)
    values = list(state.values())[1:]
    shadows: dict[str, object] = {
        "short": values[:-1],
        "long": [*values, values[0]],
        "backwards": values[::-1],
        "empty": [],
        "a name": "ema",
        "of numbers": list(range(len(values))),
        "nested": [values],
        "one tensor": values[0],
        "by name": dict(zip(state, values, strict=False)),
    }
    for what, shadow in shadows.items():
        yield f"averages {what}", form.with_content(saved(averages(state, shadow)))
    for value in NASTY:
        yield f"averages of {value!r:.40}", form.with_content(saved(averages(state, [value] * len(values))))
        yield f"ema {value!r:.40}", form.with_content(saved({"model": state, "ema": value}))
    for prefix in ("module.", "a" * 10_000 + ".", ".", "..", "0.", "ema.", "\0.", "blocks.0.", "x_embedder.", "é."):
        renamed = {prefix + key: value for key, value in state.items()}
        yield f"behind {prefix[:20]!r}", form.with_content(saved(renamed))
        yield f"behind {prefix[:20]!r} and beside it", form.with_content(saved({**renamed, **state}))
        half = dict([*list(renamed.items())[:9], *state.items()])
        yield f"half behind {prefix[:20]!r}", form.with_content(saved(half))
    deep: Any = state
    for _ in range(40):
        deep = {"model": deep}
    yield "far inside", form.with_content(saved(deep))
    yield "many sets", form.with_content(saved({f"run{number}": state for number in range(200)}))
    yield "lists of lists", form.with_content(saved({"ema": [[[[value]]] for value in values], "model": state}))


def truncated(form: Form) -> Cases:
    for percent in range(100):
        yield f"truncated to {percent} %", form.with_content(form.content[: len(form.content) * percent // 100])
    yield "one byte short", form.with_content(form.content[:-1])
    yield "one byte more", form.with_content(form.content + b"\0")


def flipped(form: Form, draw: random.Random, count: int) -> Cases:
    """Bits flipped anywhere, and bytes replaced where headers, pickles and directories are."""
    for number in range(count):
        content, size = bytearray(form.content), len(form.content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            near = draw.randrange(min(4096, size))
            where = (draw.randrange(size), near, size - 1 - near)[number % 3]
            content[where] = draw.randrange(256) if number % 2 else content[where] ^ 1 << draw.randrange(8)
        yield f"flipped {number}", form.with_content(bytes(content))


def as_safetensors(header: str | dict[str, Any], values: bytes, length: int | None = None) -> bytes:
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + values


def rewritten_header(form: Form) -> Cases:
    """safetensors headers that say something else."""
    length = struct.unpack("<Q", form.content[:8])[0]
    header, values = json.loads(form.content[8 : 8 + length]), form.content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for announced in (0, 1, 7, length - 1, length + 1, len(form.content), 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header length {announced}", form.with_content(as_safetensors(header, values, announced))
    for name in (names[0], names[-1]):
        for key in ("dtype", "shape", "data_offsets"):
            for value in NASTY:
                changed = {**header, name: {**header[name], key: value}}
                yield f"{name} {key} {value!r:.40}", form.with_content(as_safetensors(changed, values))
            lacking = {other: value for other, value in header[name].items() if other != key}
            yield f"{name} without {key}", form.with_content(as_safetensors({**header, name: lacking}, values))
        start, end = header[name]["data_offsets"]
        shape = header[name]["shape"]
        for offsets in ([end, start], [start + 4, end + 4], [start - 4, end - 4], [start, 2**63], [0, end - start]):
            changed = {**header, name: {**header[name], "data_offsets": offsets}}
            yield f"{name} at {offsets}", form.with_content(as_safetensors(changed, values))
        for other in (
            [*shape, 1],
            [1] * 10_000 + shape,
            [2**62, *shape],
            [0, 2**63],
            [0, 2**62, 2**62],
            [2**32, 2**32, 0],
            [-1, *shape],
            list(reversed(shape)),
            [str(count) for count in shape],
        ):
            changed = {**header, name: {**header[name], "shape": other}}
            yield f"{name} of shape {other!r:.40}", form.with_content(as_safetensors(changed, values))
        for dtype in ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "X"):
            changed = {**header, name: {**header[name], "dtype": dtype}}
            yield f"{name} as {dtype}", form.with_content(as_safetensors(changed, values))
            half = {**changed, name: {**changed[name], "shape": [*shape[:-1], shape[-1] // 2]}}
            yield f"{name} as {dtype}, half as many", form.with_content(as_safetensors(half, values))
        for other in (
            "",
            "\0",
            "a" * 100_000,
            "blocks.999999999.attn.qkv.weight",
            "blocks.0",
            "../../etc",
            "é\n\x1b[2J",
        ):
            changed = {other if key == name else key: value for key, value in header.items()}
            yield f"{name} named {other!r:.40}", form.with_content(as_safetensors(changed, values))
    text = json.dumps(header)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for what, other in {
        "deep": '{"a":' * 100_000,
        "deep list": '{"a":' + "[" * 100_000,
        "twice": text[:-1] + "," + text[1:],
        "first twice": text[:-1] + f',"{names[0]}":{json.dumps(header[names[0]])}}}',
        "NaN": text.replace('"shape": [', '"shape": [NaN, ', 1),
        "digits": text.replace('"shape": [', '"shape": [' + "9" * 10_000 + ", ", 1),
        "list": "[]",
        "empty": "{}",
        "nothing": "",
        "spaces": " " * 1000 + text,
        "array": json.dumps(list(header.items())),
        "metadata": json.dumps({**header, "__metadata__": {"a": 1}}),
        "metadata list": json.dumps({**header, "__metadata__": []}),
        "tensors of 3": json.dumps(dict.fromkeys(header, 3)),
        "many": json.dumps(header | {f"x{n}": empty for n in range(9999)}),
    }.items():
        yield f"header {what}", form.with_content(as_safetensors(other, values))


def rewritten_index(form: Form) -> Cases:
    """An index of shards that says something else, or stops early."""
    name = f"{STEM}.safetensors.index.json"
    text = form.files[name].decode()
    index = json.loads(text)
    first = next(iter(index["weight_map"]))

    def case(what: str, changed: str | dict[str, Any]) -> tuple[str, Form]:
        content = changed if isinstance(changed, str) else json.dumps(changed)
        return f"index {what}", form.with_content(content.encode(), name)

    for percent in range(0, 100, 4):
        yield case(f"truncated to {percent} %", text[: len(text) * percent // 100])
    for value in NASTY:
        yield case(f"weight_map {value!r:.40}", {**index, "weight_map": value})
        yield case(f"{first} {value!r:.40}", {**index, "weight_map": {**index["weight_map"], first: value}})
        yield case(f"metadata {value!r:.40}", {**index, "metadata": value})
    for outside in ("/etc/passwd", "../a", "a/../b", "..", ".", "/", "\\", "a\0b", "~", "config.json", name, "\ud800"):
        yield case(f"names {outside!r}", {**index, "weight_map": {**index["weight_map"], first: outside}})
        yield case(f"names only {outside!r}", {"weight_map": dict.fromkeys(index["weight_map"], outside)})
    yield case("is deep", '{"weight_map":' * 100_000)
    yield case("names 5000", {"weight_map": {f"a{n}": f"b{n}" for n in range(5000)}})
    shards = sorted(shard for shard in form.files if shard.endswith(".safetensors"))
    for shard in shards:
        yield (
            f"{shard} missing",
            Form({key: value for key, value in form.files.items() if key != shard}, "", shard, None),
        )
        yield f"{shard} twice", form.with_content(form.files[shards[0]], shard)


def rewritten_config(form: Form) -> Cases:
    """A config.json that says something else."""
    text = form.files["config.json"].decode()
    config = json.loads(text)

    def case(what: str, content: str) -> tuple[str, Form]:
        return f"config {what}", form.with_content(content.encode("utf-8", "surrogatepass"), "config.json")

    for percent in range(0, 100, 5):
        yield case(f"truncated to {percent} %", text[: len(text) * percent // 100])
    for key in config:
        for value in NASTY:
            yield case(f"{key} {value!r:.40}", json.dumps({**config, key: value}))
        lacking = {other: value for other, value in config.items() if other != key}
        yield case(f"without {key}", json.dumps(lacking))
    yield case("is deep", '{"a":' * 100_000)
    yield case("is a list", "[]")
    yield case("has a long key", json.dumps({**config, "a" * 100_000: 1}))
    yield case("has many keys", json.dumps({**config, **{f"k{n}": n for n in range(5000)}}))
    yield case("is in another encoding", "\ud800")


def rewritten_zip(form: Form, draw: random.Random) -> Cases:
    """Zips whose directory, entries or pickle are others."""
    with zipfile.ZipFile(io.BytesIO(form.content)) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    root = entries[0][0].filename.split("/")[0]

    def packed(changed: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Form:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in changed:
                archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
        return form.with_content(file.getvalue())

    plain = [(entry.filename, data) for entry, data in entries]
    yield "packed again", packed(plain)
    yield "packed backwards", packed(plain[::-1])
    yield "deflated", packed(plain, zipfile.ZIP_DEFLATED)
    yield "bzip2", packed(plain, zipfile.ZIP_BZIP2)
    yield "a bomb", packed([*plain, (f"{root}/data/bomb", b"\0" * (64 << 20))], zipfile.ZIP_DEFLATED)
    yield "no entries", packed([])
    yield "other folders", packed([(f"{n}/{name}", data) for n, (name, data) in enumerate(plain)])
    yield "outside", packed([(f"../../{name}", data) for name, data in plain])
    for number, (name, data) in enumerate(plain):
        others = plain[:number] + plain[number + 1 :]
        yield f"without {name}", packed(others)
        yield f"{name} empty", packed([*others, (name, b"")])
        yield f"{name} half", packed([*others, (name, data[: len(data) // 2])])
        yield f"{name} longer", packed([*plain[:number], (name, data + b"\0" * 64), *plain[number + 1 :]])
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = [packed([*plain, plain[number]]) for number in (0, 3)]
    for number, one in enumerate(twice):
        yield f"a name twice {number}", one
    for order in (b"big", b"", b"little\0", b"\xff" * 6):
        yield f"byteorder {order!r}", packed([(name, order if "byteorder" in name else data) for name, data in plain])
    # Fields of the directory, at its end: (offset in the entry, size, what).
    content, position, starts = form.content, 0, list[int]()
    while (position := content.find(b"PK\x01\x02", position)) >= 0:
        starts.append(position)
        position += 4
    fields = {"flags": (8, 2), "method": (10, 2), "packed size": (20, 4), "size": (24, 4), "name length": (28, 2)}
    fields |= {"extra length": (30, 2), "offset": (42, 4), "crc": (16, 4)}
    for field, (offset, width) in fields.items():
        for _ in range(12):
            start = draw.choice(starts)
            value = draw.choice((0, 1, 2, 8, 64, len(content), (1 << 8 * width) - 1, draw.randrange(1 << 8 * width)))
            value %= 1 << 8 * width
            changed = bytearray(content)
            changed[start + offset : start + offset + width] = value.to_bytes(width, "little")
            yield f"directory {field} {value} at {start}", form.with_content(bytes(changed))
    for value in NASTY:
        yield f"value {value!r:.40}", form.with_content(saved({"a": torch.zeros(1), "b": value}))
        yield f"key {value!r:.40}", form.with_content(saved({str(value): torch.zeros(1)}))
    for name, data in strange_pickles().items():
        changed_entries = [(entry, data if entry.endswith("data.pkl") else old) for entry, old in plain]
        yield f"pickle {name}", packed(changed_entries)
        yield f"legacy pickle {name}", form.with_content(data)
        yield f"legacy pickle {name} behind its magic", form.with_content(legacy_start() + data)


def rewritten_tar(form: Form, draw: random.Random) -> Cases:
    """Headers of tar files that say something else, their checksums right."""
    content = form.content
    fields = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
    fields |= {"magic": (257, 8), "prefix": (345, 155)}
    values = (b"", b"\0" * 12, b"7" * 12, b"\x80" + b"\xff" * 11, b"-1", b"../../a.png", b"\xff\xfe", b"x" * 155)
    kinds = b"01234567gxLKSDVM"
    starts = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]
    for field, (offset, width) in fields.items():
        for value in [bytes([kind]) for kind in kinds] if field == "type" else values:
            start = draw.choice(starts)
            changed = bytearray(content)
            changed[start + offset : start + offset + width] = value[:width].ljust(width, b"\0")
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
            yield f"{field} {value!r:.30} at {start}", form.with_content(bytes(changed))
    yield "twice", form.with_content(content + content)
    yield "backwards", form.with_content(content[::-1])
    yield "zeros", form.with_content(b"\0" * len(content))


def legacy_start() -> bytes:
    """What comes before the pickle of the state dict in torch's old format: magic number, version, system."""
    magic, version = 0x1950A86A20F9469CFC6C, 1001
    system = {"protocol_version": version, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(each, protocol=2) for each in (magic, version, system))


def strange_pickles() -> dict[str, bytes]:
    """Pickles that are legal and absurd."""
    laughs = b"\x80\x02(lq\0" + b"".join(b"(h%ch%cl%b" % (n, n, b"q" + bytes([n + 1])) for n in range(60))
    storage = b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n"
    storage += b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    storage += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%btQ%b%b%b\x89ccollections\nOrderedDict\n)RtRu."

    def tensor(numel: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
        return storage % (numel, offset, shape, stride)

    def number(value: int) -> bytes:
        encoded = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + encoded

    def numbers(*values: int) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    cyclic: list[Any] = []
    cyclic.append(cyclic)
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    many = {f"{n}": n for n in range(10_000)}
    result = {
        "empty": b"",
        "stop": b".",
        "none": pickle.dumps(None, 2),
        "many": pickle.dumps(many, 2),
        "cyclic": pickle.dumps({"a": cyclic}, 2),
        "key that is nested": pickle.dumps({((((1,),),),): 1}, 2),
        "value that doubles": pickle.dumps({"a": nested}, 2),
        "laughs": laughs + b".",
        "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "long int": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "long text": b"\x80\x02X\xff\xff\xff\xff.",
        "long bytes": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        "long frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "no memo": b"\x80\x02j\xff\xff\xff\x7f.",
        "code": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        "build": b"\x80\x02cargparse\nNamespace\n)R}X\x01\x00\x00\x00aK\x01sb.",
        "namespace twice": b"\x80\x02cargparse\nNamespace\n)RK\x01b.",
        "bytearray": b"\x80\x02cbuiltins\nbytearray\n" + number(1 << 40) + b"\x85R.",
        "size": b"\x80\x02ctorch\nSize\n" + number(1 << 62) + b"\x85R.",
        "counter": b"\x80\x02ccollections\nCounter\nX\x03\x00\x00\x00abc\x85R.",
        "meta": b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
        + numbers(1 << 30, 1 << 30)
        + numbers(1 << 30, 1)
        + b"\x89tRs.",
    }
    sound = (number(16), number(0), numbers(4), numbers(1))
    result["tensor"] = tensor(*sound)
    for what, place, value in (
        ("of a huge storage", 0, number(1 << 60)),
        ("of a storage below zero", 0, number(-5)),
        ("of a storage beyond 64 bits", 0, number(1 << 70)),
        ("of a large storage", 0, number(1 << 36)),
        ("at a huge offset", 1, number(1 << 60)),
        ("at an offset below zero", 1, number(-4)),
        ("at an offset beyond 64 bits", 1, number(1 << 64)),
        ("of a huge shape", 2, numbers(1 << 40)),
        ("of a shape that overflows", 2, numbers(1 << 40, 1 << 40)),
        ("of a shape below zero", 2, numbers(-4)),
        ("of other dimensions", 2, numbers(2, 2)),
        ("of 1000 dimensions", 2, numbers(*[1] * 1000)),
        ("of no dimensions", 2, numbers()),
        ("of a huge stride", 3, numbers(1 << 60)),
        ("of a stride below zero", 3, numbers(-1)),
        ("of stride zero", 3, numbers(0)),
        ("of no shape", 2, b"N"),
        ("of text", 2, b"X\x01\x00\x00\x004"),
    ):
        parts = list(sound)
        parts[place] = value
        result[f"tensor {what}"] = tensor(*parts)
    huge_view = [number(16), number(0), numbers(1 << 40), numbers(0)]
    result["tensor of a huge view"] = tensor(*huge_view)
    result["tensor of no elements, huge"] = tensor(number(16), number(0), numbers(0, 1 << 62), numbers(1 << 62, 1))
    return result


def all_cases(forms: dict[str, Form], draw: random.Random) -> Cases:
    def named(kind: str, cases: Cases) -> Cases:
        for name, form in cases:
            yield f"{kind}: {name}", form

    for kind, form in forms.items():
        yield f"{kind}: sound", form
        yield from named(kind, truncated(form))
        yield from named(kind, flipped(form, draw, 90))
    yield from named("safetensors", rewritten_header(forms["safetensors"]))
    yield from named("shards", rewritten_index(forms["shards"]))
    yield from named("diffusers", rewritten_config(forms["diffusers"]))
    yield from named("student", rewritten_config(forms["student"]))
    yield from named("zip", rewritten_zip(forms["zip"], draw))
    yield from named("zip", rewritten_sets(forms["zip"]))


NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    "F32",
    "a" * 100_000,
    "\0\x1b[31m\n",
    [],
    [1],
    ["softmax"] * 3,
    {},
    {"a": 1},
    [[[[1]]]],
)
