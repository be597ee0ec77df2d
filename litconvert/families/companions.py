"""What lies beside a model's weights and is its own: its recipe and, in a diffusers pipeline, VAE, T5 and scheduler."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litconvert.common.files import read_json
from litconvert.common.hub import is_hub_id, path_of, split_revision
from litconvert.common.listener import SILENT, Listener
from litconvert.errors import LitconvertError, UsageError
from litconvert.recipe.packaged import packaged_recipes
from litconvert.recipe.resolve import ResolvedRecipe, flatten, resolve
from litconvert.recipe.schema import Publish, Recipe, SchedulerName, TextEncoder, Vae

INDEX, RECIPE, RECORD = "model_index.json", "recipe.yaml", "litconvert.json"
# What a push adds to the record that goes up: its files with their hashes. It is of that repository, not of the model.
PUSHED = "pushed"
SCHEDULER = "scheduler/scheduler_config.json"
# The small files that say what is beside the weights of a Hub repository.
SMALL = (INDEX, RECIPE, RECORD, SCHEDULER, "vae/config.json")
SCHEDULERS: Mapping[str, SchedulerName] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm-solver++",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
}
# Of `distill`, what is the owner's alone, and what it is without that.
OWNERS: Mapping[str, Any] = {"start": None, "trackers": ()}
# The betas of the only forward process that litconvert knows, between which they are linear.
BETAS = (0.0001, 0.02)


@dataclass(frozen=True)
class Companions:
    """What is beside a model.

    Attributes:
        place: the folder or Hub id (with its revision) that it all lies in.
        recipe: recipe.yaml of a model of ours.
        published: the recipe is a copy from the Hub: what it says of its owner's folders and repository means nothing.
        vae, text_encoder, scheduler, num_timesteps: the pipeline's own.
        other_process: how its forward process differs from the one that litconvert knows; None: it does not.
        remarks: what is there and is not used, and why.
    """

    place: str
    recipe: Path | None = None
    published: bool = False
    vae: Vae | None = None
    text_encoder: TextEncoder | None = None
    scheduler: SchedulerName | None = None
    num_timesteps: int | None = None
    other_process: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What is here, and what of that cannot be used: a word for each, and where it is or why."""
        found = [] if self.recipe is None else [("recipe", f"its own, {RECIPE}{self._settings()}")]
        if self.vae is not None:
            found.append(("VAE", f"its own, {self.vae.subfolder}/"))
        if self.text_encoder is not None:
            found.append(
                ("text encoder", f"its own, {self.text_encoder.subfolder}/ and {self.text_encoder.tokenizer}/")
            )
        if self.scheduler is not None:
            found.append(("scheduler", f"its own, {self.scheduler}"))
        others = () if self.other_process is None else (self.other_process,)
        return [*found, *(("not used", text) for text in (*self.remarks, *others))]

    @property
    def recipe_name(self) -> str | None:
        """How its own recipe is called: where the model is, and not where that was downloaded to."""
        return None if self.recipe is None else f"{self.place}/{RECIPE}"

    def _settings(self) -> str:
        """How its own recipe draws; nothing of one that this version cannot read."""
        try:
            sample = resolve(str(self.recipe)).recipe.sample
        except LitconvertError:
            return ", which cannot be read"
        return f" (sampled with {sample.scheduler} in {sample.steps} steps, guidance {sample.guidance:g})"

    def used(self, recipe: Recipe) -> list[tuple[str, str]]:
        """The same where a recipe is known: of what it has from elsewhere it is said so."""
        source = recipe.source
        elsewhere = {
            "VAE": self.vae is not None and source.vae != self.vae and source.vae and source.vae.path,
            "text encoder": source.text_encoder != self.text_encoder
            and source.text_encoder
            and source.text_encoder.path,
            "scheduler": recipe.sample.scheduler != self.scheduler and recipe.sample.scheduler,
        }
        return [
            (word, f"{elsewhere[word]}, as told; not {text}" if elsewhere.get(word) else text)
            for word, text in self.facts
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "place": self.place,
            "recipe": self.recipe_name,
            "vae": self.vae and self.vae.model_dump(exclude_none=True),
            "text_encoder": self.text_encoder and self.text_encoder.model_dump(),
            "scheduler": self.scheduler,
            "num_timesteps": self.num_timesteps,
            "not_used": [text for word, text in self.facts if word == "not used"],
        }

    def resolve(self, name: str | None, overrides: Sequence[str]) -> ResolvedRecipe:
        """The recipe that is named, or the one that lies here, or the defaults; with what lies here taken in.

        Raises UsageError as `recipe.resolve.resolve` and `taken_into` do.
        """
        if name is not None or self.recipe is None:
            return self.taken_into(resolve(name, overrides), named=name)
        resolved = resolve(str(self.recipe), overrides)
        told = {key for key, origin in resolved.origins.items() if origin == "--set"}
        return ResolvedRecipe(resolved.name, self.recorded(resolved.recipe, told), resolved.origins)

    def recorded(self, recipe: Recipe, told: set[str] | frozenset[str] = frozenset()) -> Recipe:
        """The recipe of this model with its own VAE and T5 as they lie here, and without what was its owner's alone.

        Args:
            told: keys that the user gives, which stay.
        """
        own = {"vae": self.vae, "text_encoder": self.text_encoder}
        parts: dict[str, Any] = {}
        for key, here in own.items():
            named = getattr(recipe.source, key)
            if _names(told, f"source.{key}"):
                continue
            if here is not None:
                parts[key] = here
            elif self.published and named is not None and not is_hub_id(named.path):
                parts[key] = None  # a folder of whoever pushed it
        source = recipe.source.model_copy(update=parts)
        if not self.published:
            return recipe.model_copy(update={"source": source})
        distill = {key: value for key, value in OWNERS.items() if not _names(told, f"distill.{key}")}
        changed: dict[str, Any] = {"source": source, "distill": recipe.distill.model_copy(update=distill)}
        if not _names(told, "data.path"):
            changed["data"] = recipe.data.model_copy(update={"path": None})
        if not _names(told, "publish"):
            changed["publish"] = Publish()
        return recipe.model_copy(update=changed)

    def left_out(self) -> tuple[str, ...]:
        """What a published recipe names that only its owner has, and that therefore is not used."""
        if self.recipe is None or not self.published:
            return ()
        recipe = resolve(str(self.recipe)).recipe
        vae, encoder, start = recipe.source.vae, recipe.source.text_encoder, recipe.distill.start
        named = {
            "its data set": recipe.data.path,
            "its VAE": vae.path if vae and self.vae is None and not is_hub_id(vae.path) else None,
            "its T5": encoder.path if encoder and self.text_encoder is None and not is_hub_id(encoder.path) else None,
            "the run that it started from": start and start.path,
        }
        return tuple(f"{what}, {path}" for what, path in named.items() if path)

    def taken_into(self, resolved: ResolvedRecipe, *, named: str | None) -> ResolvedRecipe:
        """A recipe that is not this model's own, with what lies here where neither it nor the user says otherwise.

        Args:
            named: the recipe that the user named, which is meant as it is. Of a packaged one only the choices are, not
                what it says of a released model's VAE, T5 and timesteps. None: nobody chose it.

        Raises UsageError for a forward process that litconvert does not know.
        """
        own = named is not None and named not in packaged_recipes()
        choices = {key for key, origin in resolved.origins.items() if origin == "--set" or named is not None}
        facts = {key for key, origin in resolved.origins.items() if origin == "--set" or own}
        recipe, origins = resolved.recipe, dict(resolved.origins)
        source: dict[str, Any] = {}
        changed: dict[str, Any] = {}
        for key, here in (("vae", self.vae), ("text_encoder", self.text_encoder)):
            if here is not None and not _names(facts, f"source.{key}"):
                source[key] = here
        if self.scheduler is not None and not _names(choices, "sample.scheduler"):
            changed["sample"] = recipe.sample.model_copy(update={"scheduler": self.scheduler})
        if not _names(facts, "diffusion.num_timesteps"):
            if self.other_process is not None:
                raise UsageError(
                    f"{self.place}: {self.other_process}; litconvert knows linear betas from {BETAS[0]:g} to "
                    f"{BETAS[1]:g} alone. Where the file is wrong about the model, say so with "
                    "--set diffusion.num_timesteps=1000"
                )
            if self.num_timesteps is not None:
                timesteps = {"num_timesteps": self.num_timesteps}
                changed["diffusion"] = recipe.diffusion.model_copy(update=timesteps)
        for part, value in source.items():
            origins = {key: origin for key, origin in origins.items() if not _names({key}, f"source.{part}")}
            origins |= {key: self.place for key, _ in flatten(value.model_dump(), f"source.{part}")}
        known = {"sample": "sample.scheduler", "diffusion": "diffusion.num_timesteps"}
        origins |= {known[section]: self.place for section in changed}
        if source:
            changed["source"] = recipe.source.model_copy(update=source)
        return ResolvedRecipe(resolved.name, recipe.model_copy(update=changed), origins)


NOTHING = Companions("")


def _names(keys: set[str] | frozenset[str], section: str) -> bool:
    """Whether one of these dotted keys is this section, or in it."""
    return any(f"{key}.".startswith(f"{section}.") for key in keys)


def companions_of(source: str | Path | None) -> Companions:
    """What is beside a source: of a folder, a file in it, or a Hub id, whose small files are downloaded.

    Nothing is said of what cannot be read: whoever opens the source says that better.
    """
    name = source.as_posix() if isinstance(source, Path) else source or ""
    if source is None or name.startswith("asset:"):
        return Companions(name)
    try:
        path = path_of(name)
    except UsageError:
        return Companions(name)
    if path is not None:
        root = next((folder for folder in _roots(path) if (folder / INDEX).is_file()), path)
        return _read(str(root), root) if root.is_dir() else Companions(name)
    folder = _small_files(name)
    return Companions(name) if folder is None else _read(name, folder, from_hub=True)


def local_model(source: str | Path, listener: Listener = SILENT) -> Path:
    """The folder of a model that is named by its folder, or by a Hub id, from which it is downloaded.

    Raises LitconvertError where that cannot be.
    """
    name = source.as_posix() if isinstance(source, Path) else source
    if Path(name).exists() or path_of(name) is not None:
        return Path(name)
    from litconvert.checkpoints.remote import fetch_model

    listener.note(f"fetching {name}")
    return fetch_model(*split_revision(name), SMALL)


def _roots(path: Path) -> list[Path]:
    """The folders that may be the pipeline that a path is of: itself, or that of its transformer."""
    folder = path if path.is_dir() else path.parent
    # Of `.` the name is not said.
    return [folder, *([folder.absolute().parent] if folder.absolute().name == "transformer" else [])]


def _small_files(name: str) -> Path | None:
    """A folder with the small files of a Hub repository, as the Hub has them or, out of its reach, the cache."""
    from litconvert.checkpoints.remote import fetch

    repo_id, revision = split_revision(name)
    try:
        return fetch(repo_id, revision, SMALL)
    except LitconvertError:
        return None


def _read(place: str, folder: Path, *, from_hub: bool = False) -> Companions:
    """What the small files in a folder say."""
    ours = (folder / RECIPE).is_file() and (folder / RECORD).is_file()
    found: dict[str, Any] = {"recipe": folder / RECIPE if ours else None}
    found["published"] = ours and (from_hub or _is_pushed(folder / RECORD))
    if not (folder / INDEX).is_file():
        return Companions(place, **found)
    try:
        return Companions(place, **found, **_of_pipeline(place, folder, from_hub=from_hub))
    except LitconvertError as error:
        return Companions(place, **found, remarks=(str(error),))


def _is_pushed(record: Path) -> bool:
    """Whether a record came from the Hub, by what a push put into it. A README.md says nothing: anybody may add one."""
    try:
        return PUSHED in read_json(record)
    except LitconvertError:
        return False


def _of_pipeline(place: str, folder: Path, *, from_hub: bool) -> dict[str, Any]:
    """What a diffusers pipeline has around its transformer, by the names of `Companions`."""
    index = read_json(folder / INDEX)
    found: dict[str, Any] = {}
    remarks: list[str] = []
    vae = _component(index, "vae")
    if vae == "AutoencoderKL" and (folder / "vae" / "config.json").is_file():
        found["vae"] = Vae(path=place, subfolder="vae")
    elif vae is not None:
        remarks.append(
            f"its VAE: {vae} is no AutoencoderKL" if vae != "AutoencoderKL" else "its VAE: vae/ is not there"
        )
    encoder, tokenizer = _component(index, "text_encoder"), _component(index, "tokenizer")
    if encoder == "T5EncoderModel" and tokenizer is not None:
        if from_hub or (folder / "text_encoder" / "config.json").is_file():
            found["text_encoder"] = TextEncoder(path=place)
        else:
            remarks.append("its text encoder: text_encoder/ is not there")
    elif encoder is not None:
        remarks.append(f"its text encoder: {encoder} is no T5 with a tokenizer")
    if (folder / SCHEDULER).is_file():
        found |= _scheduler(read_json(folder / SCHEDULER), remarks)
    return {**found, "remarks": tuple(remarks)}


def _component(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a pipeline's component; None: it has none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def _scheduler(config: Mapping[str, Any], remarks: list[str]) -> dict[str, Any]:
    """What a scheduler's config says, by the names of `Companions`."""
    kind = str(config.get("_class_name"))
    known = SCHEDULERS.get(kind)
    if known is None:
        remarks.append(f"its scheduler: {kind} is none of {', '.join(SCHEDULERS)}")
    timesteps = config.get("num_train_timesteps")
    found: dict[str, Any] = {"scheduler": known}
    if type(timesteps) is int and timesteps > 0:
        found["num_timesteps"] = timesteps
    if known == "flow-euler":
        if (shift := config.get("shift")) not in (None, 1, 1.0):
            remarks.append(f"the shift of its scheduler, {shift}: its steps are those of shift 1")
        return found
    return {**found, "other_process": _other_process(config)}


def _other_process(config: Mapping[str, Any]) -> str | None:
    """How the forward process of a scheduler's config is another than ours."""
    trained, timesteps = config.get("trained_betas"), config.get("num_train_timesteps")
    if not isinstance(trained, list) or not trained:
        trained = None
    schedule = "linear" if trained else config.get("beta_schedule", "linear")
    ends = trained[:1] + trained[-1:] if trained else [config.get("beta_start"), config.get("beta_end")]
    # What diffusers takes where the file says nothing is what DiT was trained with.
    low, high = (_number(end, beta) for end, beta in zip(ends, BETAS, strict=True))
    scale = 1000 / _number(timesteps, 1000)
    same = all(math.isclose(one, scale * beta, rel_tol=1e-3) for one, beta in zip((low, high), BETAS, strict=True))
    if trained:
        middle = trained[len(trained) // 2]
        straight = low + (high - low) * (len(trained) // 2) / max(len(trained) - 1, 1)
        same = same and math.isclose(_number(middle, 0), straight, rel_tol=1e-3)
    if schedule != "linear" or not same:
        return f"its scheduler has {schedule} betas from {low:g} to {high:g}"
    if config.get("rescale_betas_zero_snr"):
        return "its scheduler rescales the betas (rescale_betas_zero_snr)"
    if (prediction := config.get("prediction_type") or "epsilon") != "epsilon":
        return f"its model predicts {prediction} (prediction_type)"
    return None


def _number(value: Any, default: float) -> float:
    """A number above 0 of a file, NaN where it is none, and the default where the file has no such key."""
    if value is None:
        return default
    return float(value) if type(value) in (int, float) and 0 < value < math.inf else math.nan
