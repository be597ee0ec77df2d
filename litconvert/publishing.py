"""Publishing: what goes up is laid out in a folder, rehearsed, described on a card, and pushed to the Hub."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from torch import Tensor

from litconvert.card import is_hub_id, model_card
from litconvert.checkpoints import TensorInfo
from litconvert.conversion import DTYPES
from litconvert.errors import LitconvertError, UsageError, system_cause
from litconvert.families.pixart import variant_of
from litconvert.files import read_json
from litconvert.model_directory import WEIGHTS_STEM, is_checkpoint, model_source, read_provenance, weights_of
from litconvert.recipe import Recipe, Source, Vae
from litconvert.recipe_files import read_recorded
from litconvert.run_directory import is_run, model_of
from litconvert.shapes import is_pixel_space
from litconvert.sources import OpenSource, open_source
from litconvert.writing import write_weights

REPO_ID = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
AUTO_MAP = {"AutoModel": "modeling_lit.LiTTransformer2DModel"}
# Of the pictures drawn while training, the newest so many go up; those drawn before and after it always do.
STEP_PICTURES = 4
# What a push writes and another layout, or other pictures, would leave behind.
REPLACED = ["config.json", "diffusion_pytorch_model*", "model_index.json", "pipeline_lit.py", "pipeline_lit_text.py"]
REPLACED += ["transformer/*", "scheduler/*", "vae/*", "text_encoder/*", "tokenizer/*", "images/*"]
# How huggingface_hub begins the error of a card that did not pass the Hub's validation.
CARD_REFUSED = "Invalid metadata in README.md."


def push(
    directory: str | Path,
    repo_id: str,
    *,
    pipeline: bool = False,
    private: bool = False,
    dry_run: bool = False,
    vae: str | None = None,
    text_encoder: bool = False,
    weights: str = "auto",
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    on_file: Callable[[str, int], None] = lambda path, nbytes: None,
) -> str:
    """Push a model to the Hub with a card, so that it loads in stock diffusers. Called again, it resumes.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`. A push replaces an earlier one whole: its
    card, and the files that only the other layout has.

    Args:
        directory: a model directory, or a run directory of `distill`, whose pictures go up too. Of a run that is not
            finished its latest checkpoint goes up; RUN@STEP names another one.
        repo_id: `owner/name`; created when it does not exist.
        pipeline: lay out a full diffusers pipeline (scheduler, decoder) instead of the model alone.
        private: create the repository as private; refused when it exists and is public.
        dry_run: report what would go up and stop. Nothing is sent, and nothing is asked of the Hub.
        vae: folder or Hub id of the pipeline's decoder; None: the recipe's.
        text_encoder: put the recipe's T5 and its tokenizer into the pipeline too; T5-XXL is 19 GB.
        weights: of a checkpoint, `ema`, `model` (the raw weights) or `auto`, the moving average.
        revision: branch to commit to, which must exist; None: main. `refs/pr/N` goes on with a pull request.
        create_pr: open a pull request instead of committing to main.
        commit_message: of the commit.
        on_file: called with the path and the bytes of every file before anything is sent.

    Returns: the url of the repository, of its branch, or of the pull request.

    Raises UsageError for arguments that cannot be meant, LitconvertError when the model is broken or the Hub refuses.
    """
    if create_pr and revision is not None:
        raise UsageError("create_pr opens its own branch: leave revision out, or go on with revision=refs/pr/N alone")
    check_repo_id(repo_id)
    if not dry_run:
        require_login(repo_id)
    from huggingface_hub import HfApi, constants

    with _laid_out(
        directory,
        repo_id,
        pipeline=pipeline,
        vae=vae,
        text_encoder=text_encoder,
        weights=weights,
        offline=dry_run,
    ) as folder:
        for path, nbytes in _files(folder):
            on_file(path, nbytes)
        if dry_run:
            return f"{constants.ENDPOINT}/{repo_id}"
        # token=True: the stored token even where HF_HUB_DISABLE_IMPLICIT_TOKEN keeps it out of reads.
        api = HfApi(token=True)
        with _write_errors(repo_id):
            # None leaves the choice to the owner's default: an organisation's may be private.
            url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
            info = api.model_info(repo_id, revision=revision)
            if private and not info.private:
                raise LitconvertError(
                    f"{repo_id} exists and is public: make it private first "
                    f"(`hf repos settings {repo_id} --private`), or push to another name"
                )
            # Stale weights beside the new ones would be loaded; files that are not an earlier push's are left alone.
            ours = any(sibling.rfilename == "litconvert.json" for sibling in info.siblings or ())
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=REPLACED if ours else None,
                commit_message=commit_message or f"Push with litconvert {version('litconvert')}",
            )
    return commit.pr_url or (f"{url}/tree/{revision}" if revision else url)


def planned_files(
    directory: str | Path,
    repo_id: str,
    *,
    pipeline: bool = False,
    vae: str | None = None,
    text_encoder: bool = False,
    weights: str = "auto",
) -> list[tuple[str, int]]:
    """Path and bytes of every file that `push` with these arguments sends. Nothing is asked of the Hub."""
    options = {"pipeline": pipeline, "vae": vae, "text_encoder": text_encoder, "weights": weights, "offline": True}
    with _laid_out(directory, repo_id, **options) as folder:
        return _files(folder)


def check_repo_id(repo_id: str) -> None:
    """Raises UsageError for what the Hub would not take as a repository's name."""
    if not REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UsageError(
            f"{repo_id!r} is not the id of a Hub repository: write it as owner/name, letters, digits, '-', '_' and '.' "
            "only (`hf auth whoami` tells your name)"
        )


def require_login(repo_id: str) -> None:
    """Refuse before the work what cannot end in a push."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise LitconvertError(
            f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or look with --dry-run"
        )
    token = get_token()
    if token is None:
        raise LitconvertError(f"{repo_id}: not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    # A header refused by the HTTP library would be quoted in its error, token and all.
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise LitconvertError(
            f"{repo_id}: the Hub token holds characters that no token has: set HF_TOKEN again, or run `hf auth login`"
        )


@contextmanager
def _write_errors(repo_id: str) -> Iterator[None]:
    """What goes wrong while writing to the Hub, as a sentence."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise LitconvertError(f"{repo_id}: {_reason(error, owner=repo_id.split('/')[0])}") from error


def _reason(error: BaseException, owner: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    resume = "run the same command again, it goes on where it stopped"
    # A failed transfer of one file is wrapped, and the wrapper says only which file.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token: run `hf auth login` again, or set HF_TOKEN to a valid token"
        if status == 403 and "/api/" in str(error.response.url):  # elsewhere it is the storage that refuses
            return f"the token may not write to {owner}: use one with write access (`hf auth login`), or another owner"
        if status == 404:
            return "no such repository or branch: check the name, or create the branch (`hf repos branch create`)"
        if status == 429 or status >= 500:
            return f"the Hub is busy (status {status}); wait a little, then {resume}"
        return f"the Hub refused (status {status}): {_one_line(error.server_message or error)}; {resume}"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached; check the network, then {resume}"
    if isinstance(error, PermissionError):  # of hf_xet
        return f"the token has expired; run `hf auth login`, then {resume}"
    if str(error).startswith(CARD_REFUSED):
        detail = _one_line(error).removeprefix(CARD_REFUSED).strip()
        return f"the Hub refuses the card ({detail or 'no reason given'}): correct source.license in litconvert.json"
    return f"the upload failed ({_one_line(error)}); {resume}"


def _one_line(error: object) -> str:
    """An error of another library on one line, without the token, whatever that library quotes."""
    from huggingface_hub import get_token

    text, token = " ".join(str(error).split()), get_token()
    return text.replace(token, "***") if token else text


@contextmanager
def _laid_out(directory: str | Path, repo_id: str, **options: Any) -> Iterator[Path]:
    """A folder that `prepare` filled; the options are its own."""
    with TemporaryDirectory(prefix="litconvert-push-") as temporary:
        prepare(directory, temporary, repo_id=repo_id, **options)
        yield Path(temporary)


def _files(folder: Path) -> list[tuple[str, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def prepare(
    directory: str | Path,
    folder: str | Path,
    *,
    repo_id: str,
    pipeline: bool = False,
    vae: str | None = None,
    text_encoder: bool = False,
    weights: str = "auto",
    offline: bool = False,
) -> None:
    """Fill an empty folder with exactly what goes up, and rehearse it. The model directory is only read.

    Args:
        directory, repo_id, pipeline, vae, text_encoder: as for `push`.
        folder: filled; weights are links to the model directory's, or of a checkpoint written.
        weights: of a checkpoint, `ema`, `model` or `auto`, the moving average.
        offline: take a decoder and a text encoder of the Hub from its cache only.

    Raises UsageError for a directory that is none of ours, LitconvertError for one that is incomplete or broken.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    model, pictures = find_model(Path(directory), raw=weights == "model")
    provenance = without_local_paths(read_provenance(model))
    recipe = read_recorded(model / "recipe.yaml")
    source = rehearse(model, weights)
    if source.checkpoint.weights is not None:
        provenance = {**provenance, "set": source.checkpoint.weights}
    if source.checkpoint.weights == "model":
        provenance["metrics"] = {}  # those that are kept are of the moving average
    config = {key: value for key, value in read_json(model / "config.json").items() if key != "_name_or_path"}
    captions = config.get("caption_channels") is not None
    decoder = _decoder(recipe, vae, config, model) if pipeline else None
    if text_encoder and not (pipeline and captions and recipe.source.text_encoder):
        raise UsageError(
            f"{model}: a text encoder goes into the pipeline of a model of captions: give --pipeline, and name it as "
            "source.text_encoder.path in its recipe.yaml"
        )
    if pipeline:
        recipe = recipe.model_copy(update={"source": recipe.source.model_copy(update={"vae": decoder})})
    public_recipe = without_local_paths(recipe.model_dump(mode="json"))
    try:
        transformer = folder / "transformer" if pipeline else folder
        transformer.mkdir(parents=True, exist_ok=True)
        _write_json(transformer / "config.json", {**config, "auto_map": AUTO_MAP})
        _place_weights(source, model, transformer, recipe, str(provenance["digest"]))
        # AutoModel looks beside the weights or, in a pipeline's repository, at the root; DiffusionPipeline beside them.
        shipped = model / "modeling_lit.py"
        for place in {folder, transformer}:
            (place / "modeling_lit.py").write_text(shipped.read_text() if shipped.is_file() else model_source())
        if pipeline:
            _lay_out_pipeline(folder, recipe, decoder, config, text_encoder=text_encoder, offline=offline)
        _write_json(folder / "litconvert.json", provenance)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(public_recipe, sort_keys=False))
        names = [f"images/{picture.name}" for picture in pictures]
        for picture, name in zip(pictures, names, strict=True):
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(picture, folder / name)
        card = model_card(
            provenance,
            public_recipe,
            config,
            repo_id,
            pipeline=pipeline,
            text_encoder=text_encoder,
            pictures=names,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise LitconvertError(f"cannot lay out the files to push: {system_cause(error) or error}") from error


def _place_weights(source: OpenSource, model: Path, folder: Path, recipe: Recipe, digest: str) -> None:
    """The weights as safetensors: those of a model directory linked, those of a checkpoint written."""
    if not is_checkpoint(model):
        for file in source.checkpoint.files:
            _link(file, folder / file.name)
        for index in (path for path in weights_of(model) if path.suffix == ".json"):
            shutil.copyfile(index, folder / index.name)
        return
    dtype = recipe.student.dtype
    tensors = {
        name: TensorInfo(info.shape, DTYPES[dtype] if dtype else info.dtype)
        for name, info in source.checkpoint.tensors.items()
    }
    header = {"format": "pt", "litconvert": digest}
    most = recipe.student.max_shard_bytes

    def produce(name: str) -> Tensor:
        return source.values(name).to(tensors[name].dtype)

    write_weights(folder, WEIGHTS_STEM, tensors, produce, lambda: header, max_shard_bytes=most)


def find_model(directory: Path, *, raw: bool = False) -> tuple[Path, list[Path]]:
    """The model directory of what the user named, and the pictures that belong to it.

    Of a run (RUN, or RUN@STEP for one of its checkpoints) the model is its finished one, or else a checkpoint.

    Raises UsageError when it is neither a model directory nor a run that holds a model.
    """
    model = Path(model_of(str(directory), raw=raw))
    if not model.is_dir():
        raise UsageError(f"{directory}: no such folder; name the one that `litconvert convert` or `distill` wrote")
    pictures: list[Path] = []
    run = directory if directory.is_dir() else Path(str(directory).rpartition("@")[0])
    if model != directory and is_run(run):
        drawn = sorted((run / "samples").glob("*.png"))
        steps = [picture for picture in drawn if picture.name.startswith("step-")]
        pictures = [run / "curves.png"] if (run / "curves.png").is_file() else []
        pictures += [picture for picture in drawn if picture not in steps[:-STEP_PICTURES]]
        if is_checkpoint(model):  # what was drawn later is of other weights
            pictures = [picture for picture in drawn if picture.stem in ("teacher", "before")]
            pictures += [step for step in steps if step.stem <= model.name][-STEP_PICTURES:]
    else:
        read_provenance(model)
    for name in ("config.json",) if is_checkpoint(model) else ("config.json", "modeling_lit.py"):
        if not (model / name).is_file():
            raise LitconvertError(f"{model}: {name} is missing, so it cannot be loaded; convert or distil it again")
    return model, pictures


def rehearse(model: Path, weights: str = "auto") -> OpenSource:
    """Load every tensor as the config wants it, strictly, so that nothing broken goes up.

    Args:
        weights: of a checkpoint, `ema`, `model` or `auto`, the moving average.

    Raises LitconvertError for weights that are missing, do not fit the config or are not finite.
    """
    if not weights_of(model) and not is_checkpoint(model):
        raise LitconvertError(f"{model}: the weights are missing or incomplete; convert or distil it again")
    source = open_source(Source(path=str(model)), weights)
    if source.reading.family != "litconvert":
        raise UsageError(f"{model}: holds a {source.reading.family} checkpoint; `litconvert convert` it first")
    for name in source.reading.origins:
        source.values(name)
    return source


def without_local_paths(value: Any, key: str = "") -> Any:
    """Plain data with every local path cut down to its file name: nobody's folders are published."""
    if isinstance(value, dict):
        return {name: without_local_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    absolute = value.startswith(("/", "~", "file:")) or PureWindowsPath(value).is_absolute()
    local = key == "path" and not value.startswith("asset:") and not is_hub_id(value)
    return PureWindowsPath(value).name if absolute or local else value


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    """The same bytes in another place, without copying gigabytes where the system allows."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def _decoder(recipe: Recipe, vae: str | None, config: Mapping[str, Any], model: Path) -> Vae | None:
    """The pipeline's decoder; None in pixel space.

    Raises UsageError for latents without one, and for pixels with one.
    """
    decoder = recipe.source.vae
    if vae is not None:
        decoder = decoder.model_copy(update={"path": vae, "subfolder": None}) if decoder else Vae(path=vae)
    if decoder is None and not is_pixel_space(config["in_channels"]):
        raise UsageError(
            f"{model}: makes latents of {config['in_channels']} channels and its recipe names no decoder: set "
            "source.vae.path in its recipe.yaml (for example stabilityai/sd-vae-ft-ema), or push without --pipeline"
        )
    return decoder


def pipeline_class(config: Mapping[str, Any]) -> tuple[str, str]:
    """Module and class of the pipeline that draws with a model of this config."""
    if config.get("caption_channels") is None:
        return "pipeline_lit", "LiTPipeline"
    alpha = variant_of(config) == "pixart-alpha"
    return "pipeline_lit_text", "LiTAlphaPipeline" if alpha else "LiTSigmaPipeline"


def _lay_out_pipeline(
    folder: Path,
    recipe: Recipe,
    decoder: Vae | None,
    config: Mapping[str, Any],
    *,
    text_encoder: bool,
    offline: bool,
) -> None:
    """What makes a model's folder a diffusers pipeline: the index, the pipeline's source, scheduler, decoder, T5."""
    from litconvert.captions import load_text_encoder
    from litconvert.sampling import load_vae, make_scheduler

    captions, in_channels = config.get("caption_channels") is not None, config["in_channels"]
    if captions and recipe.sample.scheduler == "ddpm":
        raise UsageError(
            "the text-to-image pipeline takes no learned variance, which ddpm needs: set sample.scheduler to "
            "dpm-solver++ or ddim in recipe.yaml"
        )
    prediction = config.get("prediction", "noise")
    scheduler = make_scheduler(recipe.sample.scheduler, recipe.diffusion.num_timesteps, prediction)
    scheduler.save_pretrained(folder / "scheduler")
    if decoder is not None:
        vae = load_vae(_cached(decoder) if offline else decoder)
        if vae.config.latent_channels != in_channels:
            raise UsageError(
                f"{decoder.path}: decodes latents of {vae.config.latent_channels} channels, the model makes "
                f"{in_channels}; set source.vae.path in recipe.yaml to the source's own decoder"
            )
        vae.register_to_config(scaling_factor=decoder.scaling_factor)
        vae.save_pretrained(folder / "vae")
        _forget_origin(folder / "vae" / "config.json")
    module, name = pipeline_class(config)
    shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")
    index: dict[str, Any] = {
        "_class_name": [module, name],
        "_diffusers_version": version("diffusers"),
        # AutoModel of a subfolder looks its class up here, not in the subfolder's config.
        "auto_map": AUTO_MAP,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["modeling_lit", "LiTTransformer2DModel"],
        "vae": [None, None] if decoder is None else ["diffusers", "AutoencoderKL"],
    }
    if captions:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    if text_encoder:
        assert recipe.source.text_encoder is not None
        tokenizer, encoder = load_text_encoder(recipe.source.text_encoder, offline=offline)
        tokenizer.save_pretrained(folder / "tokenizer")
        encoder.save_pretrained(folder / "text_encoder")
        for written in ("tokenizer/tokenizer_config.json", "text_encoder/config.json"):
            _forget_origin(folder / written)
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    _write_json(folder / "model_index.json", index)


def _forget_origin(path: Path) -> None:
    """Take out of a config where diffusers or transformers loaded it from."""
    kept = {key: value for key, value in read_json(path).items() if key not in ("_name_or_path", "name_or_path")}
    _write_json(path, kept)


def _cached(vae: Vae) -> Vae:
    """A decoder of the Hub as its folder in the Hub's cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(vae.path).exists():
        return vae
    try:
        config = hf_hub_download(vae.path, "config.json", subfolder=vae.subfolder, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise LitconvertError(
            f"{vae.path}: a dry run downloads nothing, and this decoder is not in the Hub's cache; "
            f"fetch it first (`hf download {vae.path}`)"
        ) from error
    return vae.model_copy(update={"path": str(Path(config).parent), "subfolder": None})
