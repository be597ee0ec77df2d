"""Carrying out the plan of a conversion."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litconvert.checkpoints.checkpoint import Extent
from litconvert.checkpoints.writing import LazyTensors
from litconvert.common.files import digest_of, refuse_source, require_space, write_whole
from litconvert.common.listener import SILENT, Listener
from litconvert.common.outputs import MODEL, whole_directory
from litconvert.common.quantities import size
from litconvert.common.tensors import DTYPES, TensorInfo
from litconvert.conversion.directory import already_done, write_model_directory
from litconvert.conversion.plan import STORED, ConversionPlan, Entry
from litconvert.conversion.provenance import FORMAT_VERSION, Provenance
from litconvert.conversion.solve_plan import SolvedStart
from litconvert.errors import UsageError
from litconvert.families.sources import OpenSource
from litconvert.recipe.inputs import Inputs, given
from litconvert.recipe.resolve import read_recorded
from litconvert.recipe.schema import Recipe, Source
from litconvert.runs.directory import model_of


def fresh_tensor(name: str, info: TensorInfo, seed: int, conv_size: int) -> Tensor:
    """Initial values of a new tensor, float32, a function of the seed and the name alone.

    Projections: Xavier-uniform weights, zero bias. Convolution: Conv2d's default, which for a depth-wise k x k is
    U(-1/k, 1/k), bias included.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    tensor = torch.empty(info.shape)
    if ".dwc." in name:
        return tensor.uniform_(-1 / conv_size, 1 / conv_size, generator=generator)
    if tensor.dim() == 1:
        return tensor.zero_()
    return nn.init.xavier_uniform_(tensor, generator=generator)


def conversion_inputs(plan: ConversionPlan, sha256: str, more: Mapping[str, Any]) -> Inputs:
    """What determines the result; `more` is what determines solved tensors."""
    recipe = plan.recipe
    # The source section is recorded with the result, and read again by distill and push: the licence, the decoder, the
    # hints. Its path is not: a source may be moved.
    values = {
        "file": {
            "sha256": sha256,
            "weights": plan.source.checkpoint.weights,
            "config": plan.source.config.given,
        },
        "source": given(recipe.source, exclude={"path"}),
        "student": given(recipe.student),
        "inherit": {"attention": list(recipe.inherit.attention)},
        "seed": recipe.seed,
        **more,
    }
    first = {
        "format": FORMAT_VERSION,
        "source": sha256,
        "weights": plan.source.checkpoint.weights,
        "source_config": plan.source.config.values,
        "recorded": recipe.source.model_dump(mode="json", exclude={"path"}),
        "student": recipe.student.model_dump(mode="json"),
        "inherit": recipe.inherit.attention,
        "license": recipe.source.license.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    # Nothing was solved when outputs had digests of this kind.
    return Inputs(values, digest_of(first) if plan.solve is None else None)


def is_converted(plan: ConversionPlan, out: Path, inputs: Inputs, *, force: bool) -> bool:
    """Whether `out` is the result of these inputs already; what comes after its weights in the recipe is kept up.

    Raises LitconvertError when something else is there that is not to be replaced.
    """
    if not out.exists() or not already_done(out, inputs, force=force):
        return False
    recipe = _with_absolute_sources(plan.recipe)
    # The weights are those of these inputs; what comes after them in the recipe may have changed.
    if not _records(out / "recipe.yaml", recipe):
        write_whole(out / "recipe.yaml", recipe.to_yaml())
    return True


def refuse_early(plan: ConversionPlan, out: Path) -> None:
    """Raise for an output that would overwrite the source, and for a new one that the disk has no room for."""
    refuse_source(out, plan.source.checkpoint.files)
    if not out.exists():
        require_space(out, plan.totals["student_bytes"])


def carry_out(
    plan: ConversionPlan,
    out: Path,
    *,
    force: bool = False,
    solved: SolvedStart | None = None,
    listener: Listener = SILENT,
) -> Path:
    """Write the student of a plan, whole or not at all. The caller keeps `out` to itself.

    Args:
        out: the model directory. One made from the same inputs is left as it is.
        force: replace an `out` that was made from other inputs.
        solved: of a plan that solves.
        listener: hears of each tensor that is written.

    Returns: the model directory.
    """
    assert (plan.solve is None) == (solved is None)
    refuse_source(out, plan.source.checkpoint.files)
    checkpoint, recipe = plan.source.checkpoint, _with_absolute_sources(plan.recipe)
    # The digest is reading and arithmetic: on a second core it costs the copying no time.
    with ThreadPoolExecutor(max_workers=1) as pool, _one_thread():
        hashing = pool.submit(checkpoint.sha256)

        def inputs() -> Inputs:
            return conversion_inputs(plan, hashing.result(), solved.inputs if solved else {})

        if out.exists() and is_converted(plan, out, inputs(), force=force):
            listener.note(f"already done: {out}")
            return out
        require_space(out, plan.totals["student_bytes"])
        listener.note(f"writing {size(plan.totals['student_bytes'])} to {out}")
        for remark in plan.source.check_recomputed():
            listener.note(remark)
        for name in _unread(plan):
            plan.source.values(name)
        tensors = _student_tensors(plan, solved)
        with whole_directory(out, MODEL) as folder, listener.task("convert", len(tensors.infos)) as task:
            write_model_directory(
                folder,
                config=plan.config,
                tensors=tensors,
                recipe=recipe,
                provenance=lambda: _provenance(plan, recipe, inputs(), solved),
                task=task,
            )
    return out


def _records(path: Path, recipe: Recipe) -> bool:
    """Whether a student's recorded recipe is this one, wherever the source's files are now."""
    try:
        return read_recorded(path).model_copy(update={"source": recipe.source}) == recipe
    except UsageError:  # of a version that knew other keys
        return False


def _student_tensors(plan: ConversionPlan, solved: SolvedStart | None) -> LazyTensors:
    """The student's weights: inherited ones checked, fresh ones made, solved ones as they were solved."""
    written = [entry for entry in plan.entries if entry.fate in STORED]
    fates = {entry.target: entry.fate for entry in written}
    written.sort(key=lambda entry: _place(plan.source, entry))
    infos = {str(entry.target): TensorInfo(entry.shape, DTYPES[entry.dtype]) for entry in written}

    def produce(name: str) -> Tensor | Extent | Iterator[Tensor]:
        if fates[name] == "solved":
            assert solved is not None
            return solved.tensors[name]
        if fates[name] == "fresh":
            return fresh_tensor(name, infos[name], plan.recipe.seed, plan.recipe.student.conv_size)
        return plan.source.checked(name, infos[name].dtype)

    return LazyTensors(infos, produce)


def _place(source: OpenSource, entry: Entry) -> tuple[int, str, int]:
    """Where a tensor is written: those that are copied come first and as they lie in the source, so that neighbours are
    copied together."""
    extent = source.extent(str(entry.target)) if entry.fate == "inherited" else None
    return (0, str(extent.path), extent.offset) if extent else (1, "", 0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: checks and casts are bound by memory, and two threads on busy cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _provenance(plan: ConversionPlan, recipe: Recipe, inputs: Inputs, solved: SolvedStart | None) -> Provenance:
    """That of a converted student."""
    return Provenance(
        **inputs.record,
        source={
            "path": recipe.source.path,
            "revision": plan.source.checkpoint.revision,
            "sha256": inputs.values["file"]["sha256"],
            "family": plan.source.reading.family,
            "layout": plan.source.reading.layout,
            "weights": plan.source.checkpoint.weights,
            "license": recipe.source.license.model_dump(),
        },
        plan={"groups": plan.groups, "totals": plan.totals, "macs": plan.macs},
        seed=plan.recipe.seed,
        solve=None if solved is None else solved.record,
    )


def _unread(plan: ConversionPlan) -> Iterator[str]:
    """Model tensors of the source that are dropped: their values are checked all the same."""
    taken = {entry.target for entry in plan.entries if entry.fate == "inherited"}
    return (name for name in plan.source.reading.origins if name not in taken)


def _with_absolute_sources(recipe: Recipe) -> Recipe:
    """Local paths made absolute, so that teachers, decoder and text encoder are found from any folder.

    A run (RUN, RUN@STEP) becomes the model that it stands for now.
    """

    def resolved(path: str) -> str:
        path = model_of(path)
        return str(Path(path).resolve()) if os.path.exists(path) else path

    def absolute(source: Source) -> Source:
        parts = {
            name: part.model_copy(update={"path": resolved(part.path)})
            for name in ("vae", "text_encoder")
            if (part := getattr(source, name)) is not None
        }
        if source.path is not None:
            parts["path"] = resolved(source.path)
        return source.model_copy(update=parts)

    solve = recipe.solve and recipe.solve.model_copy(
        update={name: resolved(path) for name in ("data", "embeddings") if (path := getattr(recipe.solve, name))}
    )
    teacher = recipe.distill.teacher and absolute(recipe.distill.teacher)
    distill = recipe.distill.model_copy(update={"teacher": teacher})
    return recipe.model_copy(update={"source": absolute(recipe.source), "solve": solve, "distill": distill})
