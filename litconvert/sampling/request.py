"""`sample` as a user asks for it: from a path and options to files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from litconvert.common.device import default_device
from litconvert.errors import UsageError
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.model.shapes import is_pixel_space
from litconvert.recipe.resolve import resolve, resolve_data
from litconvert.recipe.schema import Source
from litconvert.sampling.captions import Captions, encode_prompts, read_embeddings, write_embeddings
from litconvert.sampling.draw import cycled, draw, make_scheduler
from litconvert.sampling.pictures import NUM_IMAGES, load_vae, save_grid, save_npz, to_images

# Of the samples in an NPZ file, those that are on the sheet beside it.
NPZ_SHEET = 100


def parse_classes(text: str | None, count: int, num_classes: int) -> Tensor:
    """`0,3,7` cycled to `count` labels (count,) int64; None: every class in turn."""
    if text is None:
        return torch.arange(count) % num_classes
    try:
        labels = torch.tensor([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UsageError(f"--classes {text!r}: write labels as 0,3,7") from error
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UsageError(f"--classes {text!r}: the model's classes are 0 to {num_classes - 1}")
    return labels[torch.arange(count) % len(labels)]


def sample_to_files(
    model: str,
    *,
    out: Path,
    teacher: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    classes: str | None = None,
    prompts: Sequence[str] = (),
    negative_prompt: str | None = None,
    embeddings: Path | None = None,
    save_embeddings: Path | None = None,
    npz: Path | None = None,
    latents: Path | None = None,
    num_attention_heads: int | None = None,
    weights: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Path]:
    """Draw samples of a model, and of a teacher on the same noise, and write them.

    Args:
        model, teacher: run (RUN, or RUN@STEP for one of its checkpoints) or model directory, or any checkpoint.
        out: PNG grid; the teacher's rows come first.
        recipe: whose `sample` section and VAE are used; None: the one recorded with the model, if any.
        classes: labels such as `0,3,7`.
        prompts, negative_prompt: of a model of captions; none: the recipe's. T5 is freed before the model is read.
        embeddings: captions encoded earlier, instead of prompts.
        save_embeddings: where to write the captions, as `embeddings` reads them.
        npz: the model's images for the ADM evaluator.
        latents: undecoded latents as safetensors, instead of pictures.
        weights: of the model, where it is a training checkpoint: `ema`, `model`, or `auto`, EMA if present.
        on_note: told which checkpoint a run that is not finished is drawn from.

    Returns: the files written.
    """
    from litconvert.checkpoints.writing import write_safetensors
    from litconvert.common.tensors import TensorInfo
    from litconvert.families.sources import open_source, read_model
    from litconvert.runs.directory import model_of

    path = model_of(model, raw=weights == "model")
    if path != model and Path(path).name != "model":
        on_note(f"drawn from the checkpoint {path}")
    if recipe is None and (Path(path) / "recipe.yaml").is_file():
        recipe = path
    settings = (resolve(recipe, overrides) if recipe else resolve_data({}, overrides, "command line")).recipe
    given = resolve_data({}, [one for one in overrides if one.startswith("source.")], "command line").recipe.source

    def source_of(name: str) -> Source:
        # The recipe's hints describe its own source; any other checkpoint takes those given here, or tells for itself.
        told = settings.source if settings.source.path in (None, name, str(Path(name).resolve())) else given
        if (Path(name) / "litconvert.json").is_file():
            told = Source()  # its config.json says it all
        update = {"path": name, "num_attention_heads": num_attention_heads or told.num_attention_heads}
        return told.model_copy(update=update)

    if npz is not None and latents is not None:
        raise UsageError("--npz needs decoded images and --latents skips decoding; give one of them")
    sources = [open_source(source_of(model_of(teacher)))] if teacher else []
    sources.append(open_source(source_of(path), weights))
    configs = [source.reading.config for source in sources]
    config = configs[-1]
    for other in configs:
        for key in ("in_channels", "sample_size", "num_classes", "caption_channels", "caption_tokens"):
            if other[key] != config[key]:
                raise UsageError(
                    f"{teacher} has {key}={other[key]}, {model} has {config[key]}: they cannot share noise or condition"
                )
    chosen = settings.sample
    for one in configs:
        make_scheduler(chosen.scheduler, settings.diffusion.num_timesteps, one["prediction"])  # refuses before the work
    device = default_device()
    vae = load_vae(settings.source.vae).to(device) if settings.source.vae and latents is None else None
    if vae is None and latents is None and not is_pixel_space(config["in_channels"]):
        to_images(torch.empty(1, config["in_channels"], 1, 1), None)  # refuses, and says what to give
    conditions: Tensor | Captions
    if config["caption_channels"] is None:
        if prompts or negative_prompt is not None or embeddings or save_embeddings:
            raise UsageError(f"{model} is a model of classes and reads no captions: choose with --classes")
        conditions = parse_classes(classes, chosen.num_images or NUM_IMAGES, config["num_classes"])
    else:
        if classes is not None:
            raise UsageError(f"{model} is a model of captions and has no classes: choose with --prompt")
        if embeddings is not None:
            if prompts or negative_prompt is not None:
                raise UsageError("--embeddings are captions encoded already: leave --prompt and --negative-prompt out")
            captions = read_embeddings(embeddings)
        else:
            shared = {**config, "null_caption": all(other["null_caption"] for other in configs)}
            captions = encode_prompts(settings, shared, prompts, negative_prompt)
        captions = captions.padded(config["caption_tokens"], config["caption_channels"])
        if save_embeddings is not None:
            write_embeddings(captions, save_embeddings)
        conditions = cycled(captions, chosen.num_images or len(captions))
    # Undecoded, the model's alone are written.
    models = [read_model(source, torch.float32).to(device) for source in (sources[-1:] if latents else sources)]
    total, done = len(models) * -(-len(conditions) // chosen.batch_size) * chosen.steps, [0]

    def on_step() -> None:
        done[0] += 1
        on_progress(done[0], total)

    def drawn(one: LiTTransformer2DModel) -> Iterator[Tensor]:
        return draw(
            one,
            chosen,
            conditions,
            seed=chosen.seed,
            batch_size=chosen.batch_size,
            num_timesteps=settings.diffusion.num_timesteps,
            on_step=on_step,
        )

    for path_out in (latents, npz, None if latents else out):
        if path_out is not None:
            path_out.parent.mkdir(parents=True, exist_ok=True)
    if latents is not None:
        tensors = {"latents": torch.cat(list(drawn(models[-1])))}
        if not isinstance(conditions, Captions):
            tensors["class_labels"] = conditions
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
        write_safetensors(latents, infos, tensors.__getitem__, {"format": "pt"})
        return [latents]
    factor = settings.source.vae.scaling_factor if settings.source.vae else 1.0
    images = [np.concatenate([to_images(batch, vae, factor) for batch in drawn(one)]) for one in models]
    columns = min(10, len(conditions))
    # A sheet of 50,000 would be of no use to anybody.
    sheets = images if npz is None else [one[:NPZ_SHEET] for one in images]
    # Whole rows, so that the teacher's grid ends where the student's begins.
    padded = [np.concatenate([one, np.full((-len(one) % columns, *one.shape[1:]), 255, np.uint8)]) for one in sheets]
    save_grid(np.concatenate(padded), out, columns=columns, scale=max(1, 64 // config["sample_size"]))
    if npz is not None:
        save_npz(images[-1], None if isinstance(conditions, Captions) else conditions, npz)
        return [out, npz]
    return [out]
