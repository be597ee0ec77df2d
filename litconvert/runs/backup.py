"""Copies of a run on the Hub while it trains."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitScheduler, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from litconvert.common.hub import check_repo_id, hub_errors, require_login
from litconvert.common.listener import Listener
from litconvert.errors import LitconvertError

FOLDER = "run"
# Checkpoints are large and of use on this machine only; what is being written appears under its name when it is whole.
IGNORED = [".lock", "latents/*", "checkpoints/*", "teacher-outputs/*", "wandb/*", "*.partial*"]


class Backup:
    """Commits what has changed in a run directory to `run/` of a Hub repository, every so many minutes.

    In a folder, so that this and a later `push` to the same repository stay out of each other's way. Files go up as
    they are: recipe.yaml names local paths, which `push` leaves out. On the main process alone.

    Args:
        run: the run directory, which exists.
        repo_id: `owner/name`; created when it does not exist.
        minutes: between commits.
        private: create the repository as private; refused when it exists and is public.
        listener: told, from another thread, of an upload that failed. The next one makes up for it.

    Raises UsageError or LitconvertError, before anything is trained, where no upload can ever work: the name, the
    login, the rights. Where the Hub is only out of reach, that is noted, and tried again.
    """

    def __init__(self, run: Path, repo_id: str, minutes: float, *, private: bool, listener: Listener) -> None:
        self.run, self.repo_id, self.minutes, self.private = run, repo_id, minutes, private
        self.listener = listener
        self.uploads: _Uploads | None = None
        self.retry: threading.Timer | None = None
        self.stopping = False
        check_repo_id(repo_id)
        require_login(repo_id)
        error = self._start()
        if error is not None and _is_final(error):
            raise error

    def stop(self) -> None:
        """A last commit, and no more after it."""
        self.stopping = True
        if self.retry is not None:
            self.retry.cancel()
            self.retry.join()
        if self.uploads is None:
            self._start(again=False)
        if self.uploads is not None:
            self.uploads.trigger().result()
            self.uploads.stop()

    def _start(self, *, again: bool = True) -> LitconvertError | None:
        """Begin to upload; what is in the way, if anything, is noted, and tried `again` after the usual pause."""
        try:
            with hub_errors(self.repo_id):
                api = HfApi(token=True)
                api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
                if self.private and not api.model_info(self.repo_id).private:
                    raise LitconvertError(
                        f"{self.repo_id} exists and is public: make it private first "
                        f"(`hf repos settings {self.repo_id} --private`), or back up to another name"
                    )
                self.uploads = _Uploads(
                    self._failed,
                    repo_id=self.repo_id,
                    folder_path=self.run,
                    path_in_repo=FOLDER,
                    every=self.minutes,
                    ignore_patterns=IGNORED,
                    hf_api=api,
                )
            return None
        except LitconvertError as error:
            if not _is_final(error):
                self._failed(error)
                if again:
                    self.retry = threading.Timer(60 * self.minutes, self._start)
                    self.retry.daemon = True
                    self.retry.start()
            return error

    def _failed(self, error: BaseException) -> None:
        reason = " ".join(str(error).split())
        what = "training goes on, and the next backup takes up what this one missed"
        if self.stopping:
            what = f"it was the last one; `hf upload {self.repo_id} {self.run} {FOLDER}` takes up what it missed"
        self.listener.note(f"backup: {reason}; {what}")


def _is_final(error: BaseException) -> bool:
    """Whether the Hub said no, rather than nothing or `later`."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code < 500 and cause.response.status_code != 429
    return not isinstance(cause, HTTPError | ConnectionError | TimeoutError)


class _Uploads(CommitScheduler):
    """Hands a failed upload on, where the scheduler would only log it."""

    def __init__(self, on_failure: Callable[[BaseException], None], **options: Any) -> None:
        self.on_failure = on_failure
        super().__init__(**options)

    def push_to_hub(self) -> Any:
        try:
            with hub_errors(self.repo_id):
                return super().push_to_hub()
        except Exception as error:  # whatever it is, the next upload comes
            self.on_failure(error)
            return None
