"""What a data set holds, as plain data and as a sheet of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from litconvert.data.dataset import Bucket, LatentDataset, open_latents, read_record
from litconvert.errors import UsageError
from litconvert.model.config import is_pixel_space
from litconvert.recipe.schema import Vae
from litconvert.sampling.pictures import load_vae, to_images
from litconvert.sampling.sheets import Part, save_sheet


def describe_data(path: str | Path) -> dict[str, Any]:
    """Samples, shapes, kind, conditions and bytes of a data set."""
    folder, data = Path(path), open_latents(path)
    record = read_record(folder)
    facts: dict[str, Any] = {
        "path": str(folder),
        "samples": len(data),
        "buckets": [{"shape": list(bucket.shape), "samples": len(bucket)} for bucket in data.buckets],
        "kind": "pixels" if data.pixels else data.kind,
        "flipped": data.flipped,
        "condition": data.condition,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "digest": data.digest,
        "skipped": record.get("skipped", 0),
    }
    if "precision" in record:
        facts["precision"] = record["precision"]
    if data.kind == "moments":
        facts |= {"scaling_factor": data.scaling_factor, "shift_factor": data.shift_factor}
    if data.condition == "class":
        facts["classes"] = _classes(data)
        facts |= {name: record[name] for name in ("class_names", "class_order", "num_classes") if name in record}
    elif data.condition == "caption":
        lengths = np.concatenate([_column(bucket, "caption_tokens") for bucket in data.buckets])
        facts["caption_tokens"] = _spread(lengths)
        facts["caption_channels"] = data.caption_channels
        facts["null_caption"] = data.null_caption is not None
    else:
        texts = (bucket.data.data.column("caption") for bucket in data.buckets)
        facts["caption_characters"] = _spread(np.array([len(text) for one in texts for text in one.to_pylist()]))
    return facts


def _column(bucket: Bucket, name: str) -> NDArray[Any]:
    return np.asarray(bucket.data.data.column(name).to_numpy())


def _spread(lengths: NDArray[Any]) -> dict[str, float]:
    return {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _classes(data: LatentDataset) -> dict[int, int]:
    """Samples of each class."""
    labels, counts = np.unique(
        np.concatenate([_column(bucket, "class_label") for bucket in data.buckets]), return_counts=True
    )
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def classes_remark(record: Mapping[str, Any]) -> str | None:
    """That the images have fewer classes than the model they were encoded for, of its record; None: they do not."""
    names, known = record.get("class_names"), record.get("num_classes")
    if names is None or known is None or len(names) >= known:
        return None
    return f"{len(names):,} classes, the model has {known:,}: is label 0, {names[0]}, the model's class 0, and so on?"


def write_sheet(path: str | Path, out: Path, *, vae: Vae | None = None, count: int = 32) -> Path:
    """Write a PNG sheet of samples, spread evenly over the data set; of a posterior its mean.

    Args:
        vae: decodes latents; None: the one recorded with the data.

    Raises UsageError for latents that nothing decodes.
    """
    folder, data = Path(path), open_latents(path)
    record = read_record(folder)
    if vae is None and record.get("vae"):
        vae = Vae.model_validate(record["vae"])
    if not data.pixels and vae is None and not is_pixel_space(data.buckets[0].shape[0]):
        raise UsageError(
            f"{folder}: holds latents, and no VAE is recorded to decode them; name a recipe that has one (--recipe)"
        )
    decoder = load_vae(vae) if vae is not None and not data.pixels else None
    images, labels = [], list[str]()
    for index, bucket in enumerate(data.buckets):
        some = np.linspace(0, len(bucket) - 1, min(len(bucket), max(1, round(count * len(bucket) / len(data)))))
        indices = sorted({int(one) for one in some})
        noise = torch.zeros(len(indices), *bucket.shape)
        samples = data.read(index, indices, noise=noise)
        images += list(to_images(samples.clean, decoder))
        if samples.class_labels is not None:
            names = record.get("class_names", [])
            labels += [names[one] if one < len(names) else str(one) for one in samples.class_labels.tolist()]
        labels += samples.texts or []
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    title = f"{folder.name}: {len(images):,} of {len(data):,} samples"
    framed = np.stack([_framed(image, height, width) for image in images])
    save_sheet(out, [Part(title, framed, labels)], columns=8, scale=max(1, 64 // height))
    return out


def _framed(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """In the middle of a white frame."""
    top, left = height - image.shape[0], width - image.shape[1]
    margins = ((top // 2, top - top // 2), (left // 2, left - left // 2), (0, 0))
    return np.pad(image, margins, constant_values=255)
