"""The solved start on a second teacher, colour emoji at 32 px (256 tokens): errors by timestep, and pictures.

    apt-get install fonts-noto-color-emoji unicode-data libfribidi0
    python -m benchmarks.emoji_start WORK      images, data, teacher, students: what is in WORK is not made again

The teacher (recipe `emoji-32-teacher`) takes hours on two cores, goes on where it was interrupted, and is what all the
rest is made of. Then recipe `emoji-32`, with fresh and with inherited Q, K, V: the student as it starts unsolved,
as the walk leaves it, and after its short hybrid stage.

Errors are ||student's noise - teacher's||^2 / ||teacher's||^2 on the same noisy images that neither was made with, by
tenth of the timesteps, from clean images to noise. They, a plot of them and a sheet of samples on the same noise are
written to benchmarks/results/emoji_start.{json,png} and emoji_samples.png.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import litconvert
from benchmarks.emoji import FONT, TABLE, render
from benchmarks.provenance import provenance
from litconvert.common.seeds import generator_of
from litconvert.conversion.provenance import Provenance
from litconvert.data.synthesize import synthesize
from litconvert.model.diffusion import DDPM
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.resolve import resolve
from litconvert.recipe.schema import Guidance
from litconvert.sampling.draw import SamplerSettings, draw
from litconvert.sampling.pictures import to_images

RESULTS = Path(__file__).parent / "results"
RECIPE, TEACHER = "emoji-32", "emoji-32-teacher"
ARMS = {"fresh Q, K, V, O": (), "Q, K, V inherited": ("inherit.attention=q+k+v",)}
STAGES = ("unsolved", "after the walk", "after the hybrid stage")
STATES, BATCH, CLASSES = 640, 64, 9
SEED = 1234  # of the images and noise that are compared


def made_teacher(work: Path) -> Path:
    """Images, their data set and the teacher, each where it is not there yet; returns the teacher's model."""
    from litconvert.cli.app import app

    if not (work / "images").exists():
        render(work / "images", FONT, TABLE, size=32)
    if not (work / "data").exists():
        arguments = ["latents", "encode", str(work / "images"), str(work / "data"), "--recipe", TEACHER]
        app(arguments, standalone_mode=False)
    litconvert.train(work / "teacher", TEACHER, data=work / "data")
    return work / "teacher" / "model"


def made_students(work: Path, teacher: Path, name: str) -> dict[str, Path]:
    """The students of one arm by stage, each made where it is not there yet."""
    folder, inherit = work / name.replace(", ", "").replace(" ", "-").lower(), ARMS[name]
    unsolved = litconvert.convert(teacher, folder / "unsolved", RECIPE, (*inherit, "solve=null"))
    solved = litconvert.convert(teacher, folder / "solved", RECIPE, inherit)
    litconvert.distill(solved, folder / "trained", data=work / "drawn")
    return dict(zip(STAGES, (unsolved, solved, folder / "trained" / "model"), strict=True))


def opened(path: Path) -> LiTTransformer2DModel:
    model = litconvert.load(path, recipe=RECIPE)
    return model.float().eval()  # type: ignore[no-any-return]


def sampler(seed: int) -> SamplerSettings:
    """As the recipe samples."""
    return SamplerSettings(Guidance(scheduler="dpm-solver++", steps=12), 1000, seed, BATCH)


@torch.inference_mode()
def noises(model: LiTTransformer2DModel, noisy: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """What a model says of noisy images (N, C, H, W): the noise in them, without its variance."""
    channels = noisy.shape[1]
    parts = zip(*(part.split(BATCH) for part in (noisy, timestep, labels)), strict=True)
    return torch.cat([model(*part, return_dict=False)[0][:, :channels] for part in parts])


def noisy_images(teacher: LiTTransformer2DModel) -> tuple[Tensor, Tensor, Tensor]:
    """Images that the teacher drew for this alone, at timesteps spread evenly, and their classes."""
    labels = torch.arange(STATES) % CLASSES
    images = torch.cat(list(draw(teacher, labels, sampler(SEED))))
    generator = generator_of(SEED, "states")
    timestep = ((torch.arange(STATES) + torch.rand(STATES, generator=generator)) * 1000 / STATES).long()
    timestep = timestep[torch.randperm(STATES, generator=generator)]
    noise = torch.randn(images.shape, generator=generator)
    return DDPM(1000).add_noise(images, noise, timestep), timestep, labels


def errors(theirs: Tensor, mine: Tensor, timestep: Tensor) -> dict[str, Any]:
    """Of all states, and by tenth of the timesteps."""
    wrong, scale = ((part.double() ** 2).flatten(1).sum(1) for part in (mine - theirs, theirs))
    tenth = timestep // 100
    by_tenth = [float(wrong[tenth == one].sum() / scale[tenth == one].sum()) for one in range(10)]
    return {"all": float(wrong.sum() / scale.sum()), "by_tenth": by_tenth}


def sheet(rows: Mapping[str, NDArray[np.uint8]], path: Path) -> None:
    """One row of pictures (N, H, W, 3) a model, titled."""
    figure = Figure(figsize=(9, 1.15 * len(rows)), dpi=110)
    for axes, (title, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path)


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Errors by timestep, one line a student."""
    figure = Figure(figsize=(7, 4), dpi=110)
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    for number, (arm, stages) in enumerate(results.items()):
        for stage, style in zip(STAGES, (":", "--", "-"), strict=True):
            label = f"{arm}, {stage}"
            axes.plot(range(50, 1000, 100), stages[stage]["by_tenth"], style, color=colours(number), label=label)
    axes.set(yscale="log", xlabel="timestep (0: clean image)", ylabel="relative squared error of the noise")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for images, data and models")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    path = made_teacher(work)
    if not (work / "drawn").exists():
        synthesize(path, work / "drawn", RECIPE)
    teacher = opened(path)
    inputs = noisy_images(teacher)
    expected = noises(teacher, *inputs)
    shown = torch.arange(2 * CLASSES) % CLASSES
    rows = {"teacher": to_images(torch.cat(list(draw(teacher, shown, sampler(SEED + 1)))), None)}
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        found[arm] = {}
        students = made_students(work, path, arm)
        for stage, student in students.items():
            model = opened(student)
            found[arm][stage] = errors(expected, noises(model, *inputs), inputs[1])
            rows[f"{arm}: {stage}"] = to_images(torch.cat(list(draw(model, shown, sampler(SEED + 1)))), None)
        record = Provenance.read(students["after the walk"]).solve or {}
        found[arm]["walk"] = {key: record[key] for key in ("seconds", "states", "local_steps", "layers", "output")}
    steps = resolve(TEACHER).recipe.distill.stages[0].steps
    result = {"teacher_steps": steps, "arms": found, **provenance()}
    (RESULTS / "emoji_start.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(found, RESULTS / "emoji_start.png")
    sheet(rows, RESULTS / "emoji_samples.png")
    for arm, stages in found.items():
        print(arm, *(f"{stage}: {stages[stage]['all']:.4f}" for stage in STAGES), sep="\n  ")


if __name__ == "__main__":
    main()
