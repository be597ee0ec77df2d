"""Whether a feature network ranks what is worse as farther away: noise, blur, few steps of a sampler, many.

    python -m benchmarks.feature_ranking [--features efficientnet-lite0] [--model MODEL] [--count 500]

Chains of sets, each set worse than the one before it, all held against one reference of as many pictures:

- photographs: squares of 96 pixels cut out of scikit-learn's two photographs, then blurred or noised more and more;
- emoji: as `benchmarks.emoji` draws them at 32 pixels, likewise, where the font is installed;
- digits: samples of the embedded digits teacher in fewer and fewer steps, against its samples in 50, also in the
  features of the digits classifier; and those of MODEL, where one is given.

Every neighbouring pair that comes out in the wrong order is named. Written to benchmarks/results/feature_ranking.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import litconvert
from benchmarks.emoji import FONT, TABLE, render
from benchmarks.provenance import provenance
from litconvert.evaluation.image_sets import ImageSet, folder_of_pictures, read_pictures, seen
from litconvert.evaluation.metrics import frechet_distance, kernel_distance
from litconvert.evaluation.networks import DEFAULT, FeatureNetwork, open_network
from litconvert.evaluation.scores import balanced_labels
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.recipe.schema import Guidance
from litconvert.sampling.draw import SamplerSettings, draw
from litconvert.sampling.pictures import to_images

RESULTS = Path(__file__).parent / "results" / "feature_ranking.json"
TEACHER = "asset:dit-digits"
Pictures = NDArray[np.uint8]
# Standard deviations of the blur in pixels, of the noise in values of 256, and steps: each worse than the one before.
BLURS, NOISES, STEPS, MANY = (0.5, 1.0, 2.0), (8, 32, 96), (50, 8, 4, 3, 2), 50
SIDE = 96


def photographs(count: int, seed: int) -> Pictures:
    """Squares at random places of two photographs, in turn, (count, 96, 96, 3)."""
    from sklearn.datasets import load_sample_images

    both, generator = load_sample_images().images, np.random.default_rng(seed)
    cut = []
    for index in range(count):
        image = both[index % len(both)]
        top, left = (int(generator.integers(0, side - SIDE)) for side in image.shape[:2])
        cut.append(image[top : top + SIDE, left : left + SIDE])
    return np.stack(cut).astype(np.uint8)


def emoji(count: int) -> tuple[Pictures, Pictures]:
    """Two sets of pictures of 32 pixels, of all classes alike, from different draws."""
    sets = []
    for seed in (0, 1):
        with TemporaryDirectory() as folder:
            render(Path(folder) / "images", FONT, TABLE, size=32, per_class=-(-count // 9), seed=seed)
            sets.append(np.concatenate(list(read_pictures(folder_of_pictures(Path(folder)), 32, "RGB")))[:count])
    return sets[0], sets[1]


def blurred(pictures: Pictures, radius: float) -> Pictures:
    """By a Gaussian of so many pixels."""
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in pictures])


def noised(pictures: Pictures, deviation: float) -> Pictures:
    """With Gaussian noise, cut off at black and white."""
    noise = np.random.default_rng(0).normal(0, deviation, pictures.shape)
    return np.clip(np.rint(pictures + noise), 0, 255).astype(np.uint8)


def damaged(reference: Pictures, clean: Pictures) -> dict[str, dict[str, Pictures]]:
    """The chains of a clean set: blur, and noise up to nothing else."""
    nothing = np.random.default_rng(1).integers(0, 256, clean.shape, dtype=np.uint8)
    return {
        "blur": {"reference": reference, "clean": clean, **{f"blur {one:g}": blurred(clean, one) for one in BLURS}},
        "noise": {
            **{"reference": reference, "clean": clean, **{f"noise {one}": noised(clean, one) for one in NOISES}},
            "noise alone": nothing,
        },
    }


def sampled(model: LiTTransformer2DModel, count: int) -> dict[str, Pictures]:
    """Samples of a pixel-space model: the reference, and others in fewer and fewer steps."""
    labels = balanced_labels(count, int(model.config.num_classes))

    def drawn(steps: int, seed: int) -> Pictures:
        sampler = SamplerSettings(Guidance(scheduler="dpm-solver++", steps=steps), 1000, seed, 100)
        return np.concatenate([to_images(batch, None) for batch in draw(model, labels, sampler)])

    return {"reference": drawn(MANY, 1), **{f"{steps} steps": drawn(steps, 2) for steps in STEPS}}


def measured(chain: dict[str, Pictures], network: FeatureNetwork) -> dict[str, Any]:
    """The distances of a chain's sets to its reference, and the pairs that are in the wrong order."""
    (_, reference), *others = chain.items()
    expected = ImageSet.of("reference", seen([reference], network))
    rows: dict[str, dict[str, float]] = {}
    for name, pictures in others:
        found = ImageSet.of(name, seen([pictures], network))
        assert expected.outputs is not None
        assert found.outputs is not None
        rows[name] = {
            "frechet_distance": frechet_distance(expected.pooled, found.pooled),
            "kernel_distance": kernel_distance(expected.outputs.features, found.outputs.features),
        }
    return {"sets": rows, **{f"{metric}_wrong": wrong_pairs(rows, metric) for metric in next(iter(rows.values()))}}


def wrong_pairs(rows: dict[str, dict[str, float]], metric: str) -> list[list[str]]:
    """Neighbours of which the worse one comes out nearer."""
    return [[one, two] for one, two in pairwise(rows) if rows[one][metric] >= rows[two][metric]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every chain, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default=DEFAULT, help="the network")
    parser.add_argument("--model", help="a pixel-space model of classes, whose steps are ranked too")
    parser.add_argument("--count", type=int, default=500, help="pictures a set")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    network, count = open_network(asked.features), asked.count
    chains: dict[str, Callable[[], dict[str, dict[str, Pictures]]]] = {
        "photographs": lambda: damaged(photographs(count, 0), photographs(count, 1)),
        "digits": lambda: {"steps": sampled(litconvert.load(TEACHER), count)},
    }
    if FONT.is_file() and TABLE.is_file():
        chains["emoji"] = lambda: damaged(*emoji(count))
    if asked.model:
        chains[asked.model] = lambda: {"steps": sampled(litconvert.load(asked.model), count)}
    results: dict[str, Any] = {}
    for name, make in chains.items():
        for kind, chain in make().items():
            networks = [network, *([open_network("digits")] if name == "digits" else [])]
            for one in networks:
                key = f"{name}, {kind}, in {one.name}"
                results[key] = measured(chain, one)
                print(key)
                for row, values in results[key]["sets"].items():
                    print(f"  {row:12} " + "  ".join(f"{metric} {value:.4g}" for metric, value in values.items()))
                print(
                    "  wrong:",
                    results[key]["frechet_distance_wrong"],
                    results[key]["kernel_distance_wrong"],
                    flush=True,
                )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({**provenance(), "count": count, "chains": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
