"""Publishing: what goes up is laid out in a folder, rehearsed, described on a card, and pushed to the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from litconvert.common.hub import check_repo_id, no_hub_bars, require_login
from litconvert.common.listener import SILENT, Listener
from litconvert.common.quantities import size
from litconvert.errors import LitconvertError, UsageError
from litconvert.publishing.layout import prepare
from litconvert.publishing.publication import Publication

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
    listener: Listener = SILENT,
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
        listener: hears the path and the bytes of every file before anything is sent.

    Returns: the url of the repository, of its branch, or of the pull request.

    Raises UsageError for arguments that cannot be meant, LitconvertError when the model is broken or the Hub refuses.
    """
    if create_pr and revision is not None:
        raise UsageError("create_pr opens its own branch: leave revision out, or go on with revision=refs/pr/N alone")
    check_repo_id(repo_id)
    if not dry_run:
        require_login(repo_id)
    asked = Publication(
        Path(directory), repo_id, pipeline, vae=vae, text_encoder=text_encoder, weights=weights, offline=dry_run
    )
    with _laid_out(asked) as folder:
        for path, nbytes in _files(folder):
            listener.note(f"{path}: {nbytes:,} bytes")
        if dry_run:
            from huggingface_hub import constants

            return f"{constants.ENDPOINT}/{repo_id}"
        total = size(sum(nbytes for _, nbytes in _files(folder)))
        listener.note(f"sending {total} to {repo_id}")
        with _write_errors(repo_id), no_hub_bars():
            return _upload(
                folder, repo_id, private=private, revision=revision, create_pr=create_pr, message=commit_message
            )


def _upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, create_pr: bool, message: str | None
) -> str:
    """Send a folder as one commit, and return where it is then."""
    from huggingface_hub import HfApi

    # token=True: the stored token even where HF_HUB_DISABLE_IMPLICIT_TOKEN keeps it out of reads.
    api = HfApi(token=True)
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
        commit_message=message or f"Push with litconvert {version('litconvert')}",
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
    asked = Publication(Path(directory), repo_id, pipeline, vae, text_encoder, weights, offline=True)
    with _laid_out(asked) as folder:
        return _files(folder)


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
def _laid_out(asked: Publication) -> Iterator[Path]:
    """A folder that `prepare` filled."""
    with TemporaryDirectory(prefix="litconvert-push-") as temporary:
        prepare(asked, temporary)
        yield Path(temporary)


def _files(folder: Path) -> list[tuple[str, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
