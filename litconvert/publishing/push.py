"""Publishing: what goes up is laid out in a folder, rehearsed, described on a card, and pushed to the Hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from litconvert.common.hub import check_repo_id, no_hub_bars, require_login, usable_token
from litconvert.common.listener import SILENT, Listener
from litconvert.common.quantities import size
from litconvert.errors import LitconvertError, UsageError
from litconvert.publishing.layout import prepare
from litconvert.publishing.publication import Destination, Publication
from litconvert.publishing.repository import Changes, Outgoing, Repository, check_commit, outgoing_in

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
    replace: bool = False,
    replace_card: bool = False,
    listener: Listener = SILENT,
) -> str:
    """Push a model to the Hub with a card, so that it loads in stock diffusers. Called again, it resumes.

    The token is that of the environment (HF_TOKEN) or of `hf auth login`. All of it is one commit, which replaces an
    earlier push whole. What others put into the repository stays, unless a stock loader would take it in place of what
    is pushed, or with it: that is named and refused, or with `replace` deleted in the same commit. A README.md that
    litconvert did not write, or that was edited since, stays too. The commit is made on what the repository held when
    it was looked at, and what it then holds is read back and compared.

    Args:
        directory: a model directory, or a run directory of `distill`, whose pictures go up too. Of a run that is not
            finished its latest checkpoint goes up; RUN@STEP names another one.
        repo_id: `owner/name`; created when it does not exist.
        pipeline: lay out a full diffusers pipeline (scheduler, decoder) instead of the model alone.
        private: create the repository as private; refused when it exists and is public.
        dry_run: report what would change, and stop. Nothing is sent; the Hub is asked what the repository holds.
        vae: folder or Hub id of the pipeline's decoder; None: the recipe's.
        text_encoder: put the recipe's T5 and its tokenizer into the pipeline too; T5-XXL is 19 GB.
        weights: of a checkpoint, `ema`, `model` (the raw weights) or `auto`, the moving average.
        revision: branch to commit to, which must exist; None: main. `refs/pr/N` goes on with a pull request.
        create_pr: open a pull request instead of committing to main.
        commit_message: of the commit.
        replace: overwrite or delete what is in the way and not litconvert's.
        replace_card: overwrite a README.md that is not litconvert's.
        listener: hears what becomes of every file before anything is sent.

    Returns: the url of the repository, of its branch, or of the pull request.

    Raises UsageError for arguments that cannot be meant, LitconvertError when the model is broken, the repository holds
    what is in the way, it changed meanwhile, or the Hub refuses.
    """
    asked = Publication(
        Path(directory), repo_id, pipeline, vae=vae, text_encoder=text_encoder, weights=weights, offline=dry_run
    )
    destination = Destination(revision, create_pr, private, replace, replace_card, commit_message)
    if dry_run:
        planned = planned_changes(asked, destination)
        _say(planned, repo_id, listener)
        planned.refuse()
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{repo_id}"
    _check(asked, destination)
    require_login(repo_id)
    with _laid_out(asked) as going, _write_errors(repo_id), no_hub_bars():
        return _upload(going, repo_id, destination, listener)


def planned_changes(asked: Publication, destination: Destination) -> Changes:
    """What a push would make of its repository. Nothing is sent, and the repository is not created.

    Where the Hub cannot be reached it is what would go up, compared with nothing. Raises as `push` does, except for
    what is in the way, which the result names.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
    )

    _check(asked, destination)
    with _laid_out(asked) as going:
        repository = None
        api = HfApi(token=usable_token(asked.repo_id) is not None)
        with _write_errors(asked.repo_id), no_hub_bars():
            try:
                if not is_offline_mode():
                    repository = Repository.read(api, asked.repo_id, destination.revision).with_texts(api)
            except RepositoryNotFoundError:
                repository = Repository(asked.repo_id)  # or one that is not ours to see
            except HfHubHTTPError:
                raise
            except HTTPError:
                pass
        if repository is not None:
            _check_private(repository, destination)
        return Changes.of(going, repository, destination)


def _check(asked: Publication, destination: Destination) -> None:
    """Refuse what cannot be meant."""
    if destination.create_pr and destination.revision is not None:
        raise UsageError(
            "a pull request opens its own branch: leave revision out, or go on with one by --revision refs/pr/N alone"
        )
    if destination.message is not None and not destination.message.strip():
        raise UsageError("the message of a commit cannot be empty: leave --message out, or say what was done")
    check_repo_id(asked.repo_id)


def _check_private(repository: Repository, destination: Destination) -> None:
    """Refuse to put into a public repository what was to be private."""
    if destination.private and repository.commit is not None and not repository.private:
        raise LitconvertError(
            f"{repository.repo_id} exists and is public: make it private first "
            f"(`hf repos settings {repository.repo_id} --private`), or push to another name"
        )


def _say(changes: Changes, repo_id: str, listener: Listener) -> None:
    """What becomes of every file."""
    for row in changes.rows:
        listener.note(f"{row.change}: {row.path}, {row.nbytes:,} bytes{f' ({row.why})' if row.why else ''}")
    if changes.repository is None:
        listener.note(f"the Hub cannot be reached, so these are compared with nothing: what {repo_id} holds is unknown")


def _upload(going: Mapping[str, Outgoing], repo_id: str, destination: Destination, listener: Listener) -> str:
    """Send the files as one commit, see what came of it, and return where it is then."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    # token=True: the stored token even where HF_HUB_DISABLE_IMPLICIT_TOKEN keeps it out of reads.
    api = HfApi(token=True)
    # None leaves the choice to the owner's default: an organisation's may be private.
    url = str(api.create_repo(repo_id, private=destination.private or None, exist_ok=True))
    repository = Repository.read(api, repo_id, destination.revision).with_texts(api)
    _check_private(repository, destination)
    changes = Changes.of(going, repository, destination)
    changes.refuse()
    _say(changes, repo_id, listener)
    sent, deleted = changes.paths("added", "changed"), changes.paths("deleted")
    place = f"{url}/tree/{destination.revision}" if destination.revision else url
    if not sent and not deleted:
        listener.note(f"{repo_id} holds all of it already: nothing to send")
        check_commit(api, str(repository.commit), going, changes)
        return place
    listener.note(f"sending {size(sum(going[path].nbytes for path in sent))} to {repo_id}")
    # One commit, with all that is added and deleted. `upload_folder` makes several of a large folder, and holds only
    # the first of them against the parent.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(path, is_folder=False) for path in deleted),
            *(CommitOperationAdd(path, going[path].file) for path in sent),
        ],
        commit_message=destination.message or f"Push with litconvert {version('litconvert')}",
        revision=destination.revision,
        create_pr=destination.create_pr,
        parent_commit=repository.commit,
    )
    listener.note("reading back what was sent")
    check_commit(api, commit.pr_revision or commit.oid, going, changes)
    return commit.pr_url or place


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
        if status == 412:
            return "it changed on the Hub while this was prepared; run the same command again, it looks at it anew"
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
def _laid_out(asked: Publication) -> Iterator[Mapping[str, Outgoing]]:
    """The files that `prepare` made."""
    with TemporaryDirectory(prefix="litconvert-push-") as temporary:
        prepare(asked, temporary)
        yield outgoing_in(Path(temporary))
