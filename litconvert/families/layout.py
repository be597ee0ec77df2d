"""A layout as data: which name each of our tensors has in it; read forwards to load, backwards to write."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litconvert.model.config import ModelConfig
from litconvert.model.shapes import model_tensors


@dataclass(frozen=True)
class Origin:
    """Where a model tensor is in a checkpoint: a tensor, or a run of its rows.

    Attributes:
        names: the checkpoint's tensors; more than one where it holds copies, which must be equal.
        part, parts: which of how many equal runs of rows, for fused projections.
    """

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Layout:
    """A way of naming and fusing the tensors of one family.

    A row gives the start of our name and of theirs; what follows (`.weight`, `.bias`) is the same in both. In either,
    `{i}` stands for the block; in theirs `[n/3]` is the n-th third of the rows, and `{*}` a copy in every block.

    Attributes:
        name: as shown to users.
        rows: ours to theirs.
        linear_rows: what is different in linear layers; None where the layout has no linear attention.
        kv_compress: whether the layout has KV-compressed attention.
    """

    name: str
    rows: Mapping[str, str]
    linear_rows: Mapping[str, str] | None = None
    kv_compress: bool = False

    def origin(self, name: str, kind: str | None, num_layers: int) -> Origin | None:
        """Where our tensor is; None when the layout has no place for it. `kind` is its layer's attention."""
        block = re.match(r"blocks\.(\d+)\.", name)
        ours = name if block is None else f"blocks.{{i}}.{name[block.end() :]}"
        special = (self.linear_rows or {}) if kind == "linear" else {}
        stem, rest = ours, ""
        while stem not in special and stem not in self.rows:
            stem, dot, last = stem.rpartition(".")
            if not dot:
                return None
            rest = f".{last}{rest}"
        theirs = (special.get(stem) or self.rows[stem]).replace("{i}", block.group(1) if block else "{i}")
        part, parts = 0, 1
        if fused := re.search(r"\[(\d)/(\d)\]$", theirs):
            part, parts = int(fused.group(1)), int(fused.group(2))
            theirs = theirs[: fused.start()]
        copies = range(num_layers) if "{*}" in theirs else range(1)
        return Origin(tuple(f"{theirs.replace('{*}', str(copy))}{rest}" for copy in copies), part, parts)

    def name_of(self, name: str) -> str:
        """What our tensor, for which there must be a place, is called in this layout; of copies the first."""
        origin = self.origin(name, None, num_layers=1)
        assert origin is not None
        return origin.names[0]

    def origins(self, config: Mapping[str, Any]) -> dict[str, Origin]:
        """Where every tensor of the model of this config is. Tensors the layout has no place for are left out."""
        full = ModelConfig.of(config)
        kinds, found = full.attention, {}
        for name in model_tensors(full):
            block = re.match(r"blocks\.(\d+)\.", name)
            origin = self.origin(name, kinds[int(block.group(1))] if block else None, len(kinds))
            if origin is not None:
                found[name] = origin
        return found
