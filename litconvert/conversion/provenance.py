"""litconvert.json, typed: where a model comes from, how it was made, and what was measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from litconvert.common.files import read_json
from litconvert.common.outputs import refuse_unfinished
from litconvert.common.versions import versions
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.companions import PUSHED

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """What is recorded of a model.

    Attributes:
        digest: of what determines it.
        defaults, inputs: number of the table of defaults, and the inputs that differ from it.
        source: what it was converted from: path, revision, sha256, family, layout, weights, license. Without a path, it
            was trained from nothing.
        plan: tensors, parameters and multiply-accumulates of its conversion.
        versions: packages that it was made with.
        seed: of fresh weights.
        solve: how the fresh attention was solved, and the errors before and after.
        metrics: scores by name.
        distillation: how it was taught: steps, stages, data, teacher, and what it started from.
        training: the same of a model that was trained from nothing.
        set: which weights of a checkpoint of a run these are, `ema` or `model`.
        others: what a later version wrote; kept as it is.
    """

    digest: str = ""
    defaults: int | None = None
    inputs: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=versions)
    seed: int | None = None
    solve: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    distillation: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    set: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Of plain data, of which any part may be missing."""
        known = {one.name for one in fields(cls)} - {"others"}
        values: dict[str, Any] = {name: record[name] for name in known if record.get(name) is not None}
        others = {name: value for name, value in record.items() if name not in known | {"format", PUSHED}}
        return cls(**{"versions": {}, **values, "others": others})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a model directory, or of a checkpoint of a run.

        Raises UsageError when the folder is none, LitconvertError for one that is not filled yet.
        """
        refuse_unfinished(folder)
        path = folder / "litconvert.json"
        if not path.is_file():
            raise UsageError(
                f"{folder}: not a model directory of litconvert (no litconvert.json); convert a checkpoint first"
            )
        record = read_json(path)
        if record.get("format") != FORMAT_VERSION:
            raise LitconvertError(
                f"{path}: format {record.get('format')}, this litconvert reads {FORMAT_VERSION}; upgrade it"
            )
        return cls.of(record)

    @property
    def record(self) -> dict[str, Any]:
        """Plain data, as litconvert.json holds it: what is not known is left out."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "others"}
        return {
            "format": FORMAT_VERSION,
            **{name: value for name, value in known.items() if value not in (None, "")},
            **self.others,
        }

    @property
    def license(self) -> Mapping[str, Any]:
        """The source's: id, name, link, as far as they were recorded."""
        return self.source.get("license") or {}

    @property
    def trained(self) -> Mapping[str, Any]:
        """How the model was taught or trained; nothing of one that was only converted."""
        return self.distillation or self.training or {}

    def in_the_middle(self, digest: str, step: int, total_steps: int) -> Self:
        """That of a checkpoint of a run, from that of the run's result.

        Its digest is its own, and what the result's says of inputs is not of this model.
        """
        key = "training" if self.distillation is None else "distillation"
        trained = {**self.trained, "steps": step, "planned_steps": total_steps}
        changed: dict[str, Any] = {"digest": digest, "inputs": None, "defaults": None, key: trained}
        return replace(self, **changed)
