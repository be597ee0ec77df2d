"""A stand-in for the Hugging Face Hub, for tests that publish and download models without the internet.

It speaks, over a real socket, the part of the Hub's HTTP protocol that huggingface_hub 2.4 uses for models, so tests
run the real client unchanged. Large files go through LFS, because Xet, which the Hub prefers, has no local server. What
the Hub refuses is refused here too; what is missing here answers 501, so that it cannot pass for "not found".
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".npz", ".png", ".safetensors")
LFS_SIZE = 5_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
ANONYMOUS, BAD_TOKEN = "Invalid username or password.", "Invalid credentials in Authorization header"


class HubError(Exception):
    """A refusal; ``code`` is what the client chooses its exception class by."""

    def __init__(self, status: int, message: str, code: str = "", **extra: str) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **extra}


@dataclass(frozen=True)
class Blob:
    """A committed file; the Hub names a regular one by its git hash and an LFS one by its SHA-256."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        stored = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file as listings give it, under the key names of both the tree and the model info."""
        entry = {"type": "file", "path": path, "rfilename": path, "size": len(self.data)}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 134}
        return {**entry, "oid": self.git_oid, "blobId": self.git_oid, **({"lfs": lfs} if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    """A revision holds every file it had, so that it stays downloadable after later ones."""

    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A model repository; it starts, as on the Hub, with one commit that holds ``.gitattributes``."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    verified: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.add_commit("main", {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}, "initial commit")

    def add_commit(self, ref: str, files: dict[str, Blob], message: str) -> Commit:
        contents = sorted((path, blob.etag) for path, blob in files.items())
        oid = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {message} {contents}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a pull request's ref or a commit hash stands for."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class HubServer(contextlib.AbstractContextManager["HubServer"]):
    """A Hub of its own on a local port (0 picks a free one), serving from construction until ``close``."""

    def __init__(self, token: str = "hf_test", *, user: str = "tester", port: int = 0) -> None:
        self.token, self.user, self.secret = token, user, secrets.token_hex(8)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.bytes_served = 0
        self.lock = threading.RLock()
        self._faults: list[tuple[str, str, int, int | None]] = []
        self._damage: dict[str, bytes] = {}
        self._listener = _Listener(self, port)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and hang up on clients too: one that keeps its connection would otherwise still be served."""
        self._listener.shutdown()
        self._listener.server_close()
        for connection in self._listener.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self) -> dict[str, str]:
        """What a client process must have in its environment before it imports huggingface_hub, which reads it once."""
        reachable = {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1", **reachable}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, ``.gitattributes`` included."""
        with self.lock:
            return {path: blob.data for path, blob in self.repositories[repo_id].at(revision).files.items()}

    def fail_next(
        self, method: str, path_fragment: str, status: int = 403, *, times: int = 1, after_bytes: int | None = None
    ) -> None:
        """Answer the next ``times`` matching requests with ``status``, or hang up on them after ``after_bytes``.

        The bytes are those of the request's body where it has one, else of the answer's; ``requests`` shows status 0.
        The client tries again by itself, with pauses that grow, after a hang-up, 408, 429 or 5xx.
        """
        with self.lock:
            self._faults += [(method, path_fragment, status, after_bytes)] * times

    def damage_next(self, path: str, data: bytes) -> None:
        """Let the next commit that has a file of this path hold other bytes than were sent."""
        with self.lock:
            self._damage[path] = data

    def take_damage(self, files: dict[str, Blob]) -> dict[str, bytes]:
        """What the commit of these files is to hold instead, which is then used up."""
        return {path: self._damage.pop(path) for path in list(self._damage) if path in files}

    def take_fault(self, method: str, target: str) -> tuple[int, int | None]:
        """The status (0 for none) and the byte count of the failure due for this request, which is then used up."""
        with self.lock:
            for fault in self._faults:
                if fault[0] == method and fault[1] in target:
                    self._faults.remove(fault)
                    return (fault[2], None) if fault[3] is None else (0, fault[3])
        return 0, None


class _Listener(ThreadingHTTPServer):
    """Knows its connections, to hang up on them, and takes it calmly when a client hangs up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub, self.connections = hub, list[Any]()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


Action = Callable[["_Handler"], object]
ROUTES: list[tuple[str, re.Pattern[str], Action]] = []


def route(method: str, path: str) -> Callable[[Action], Action]:
    """Register an action for a path in which ``{name}`` is one segment and ``{repo}`` two; each is passed unquoted."""
    pattern = path.replace("{repo}", "(?P<repo>[^/]+/[^/]+?)").replace("{", "(?P<").replace("}", ">[^/]+)")

    def register(action: Action) -> Action:
        ROUTES.append((method, re.compile(pattern), action))
        return action

    return register


class _Handler(BaseHTTPRequestHandler):
    """One connection; each action finds its request in the attributes and returns JSON or bytes to send back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def _pieces(self) -> Iterator[bytes]:
        """The body, of a known length or in chunks, piece by piece, so that a fault can cut it short."""
        chunked, left = "Transfer-Encoding" in self.headers, int(self.headers.get("Content-Length") or 0)
        while size := int(self.rfile.readline(), 16) if chunked else min(left, 65536):
            if len(piece := self.rfile.read(size)) < size:
                raise ConnectionAbortedError("the client hung up")
            left -= size
            if chunked:
                self.rfile.readline()
            yield piece
        if chunked:
            self.rfile.readline()

    def _serve(self) -> None:
        """Read the whole request, act on it one request at a time, so that commits cannot mix, and answer."""
        self.hub = self.server.hub
        failure, cut = self.hub.take_fault(self.command, self.path)
        received = bytearray()
        for piece in self._pieces():
            received += piece
            if cut is not None and len(received) >= cut:
                break
        self.body, self.status, self.out = bytes(received), 200, {"Content-Type": "application/json"}
        value: object = b""
        with self.hub.lock:
            if not (self.body and cut is not None):
                value = self._act(failure)
            self.hub.requests.append((self.command, self.path, 0 if cut is not None else self.status))
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        if cut is None or not self.body:
            self.send_response(self.status)
            for name, text in {**self.out, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            sent = b"" if self.command == "HEAD" else content[:cut]
            with self.hub.lock:
                self.hub.bytes_served += len(sent)
            self.wfile.write(sent)
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: ``HubServer.requests`` is the record."""

    def _act(self, failure: int) -> object:
        try:
            if failure:
                raise HubError(failure, "failure asked for by the test")
            return self._dispatch()
        except HubError as error:
            refusal = error
        except Exception as error:
            refusal = HubError(501, f"the stand-in broke: {error!r}")
        self.status = refusal.status
        self.out["X-Error-Message"] = str(refusal).encode("ascii", "backslashreplace").decode()
        self.out |= {"X-Error-Code": refusal.code} if refusal.code else {}
        return refusal.body

    def _dispatch(self) -> object:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, BAD_TOKEN)
        url = urlsplit(self.path)
        self.query, self.known = parse_qs(url.query), authorization is not None
        for method, pattern, action in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := pattern.fullmatch(url.path)):
                self.parts = {name: unquote(part or "") for name, part in found.groupdict().items()}
                # The storage behind the Hub is sent no token, and checking a model card needs none.
                if method == "POST" and url.path != "/api/validate-yaml" and not self.known:
                    raise HubError(401, ANONYMOUS, "RepoNotFound" if "repo" in self.parts else "")
                return action(self)
        raise HubError(501, f"no such route in the stand-in: {self.command} {self.path}")

    def _repository(self) -> Repository:
        """The one that is asked for; to a caller without a token, a private one is like one that does not exist."""
        repository = self.hub.repositories.get(self.parts["repo"])
        if repository and (self.known or not repository.private):
            return repository
        raise HubError(*((404, "Repository not found") if self.known else (401, ANONYMOUS)), "RepoNotFound")

    @route("GET", "/api/whoami-v2")
    def _whoami(self) -> object:
        if not self.known:
            raise HubError(401, ANONYMOUS)
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("GET", "/api/agent-harnesses")
    def _agents(self) -> object:
        """Asked for once per HF_HOME, to find out whether an agent runs the client."""
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST", "/api/repos/create")
    def _create(self) -> object:
        wanted = json.loads(self.body)
        if wanted.get("type", "model") != "model":
            raise HubError(501, "the stand-in has model repositories only")
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        self.hub.repositories[repo_id] = Repository(repo_id, wanted.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    @route("POST", "/api/validate-yaml")
    def _validate_card(self) -> object:
        bare = not json.loads(self.body)["content"].startswith("---\n")
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if bare else []}

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def _info(self) -> object:
        repository, keys = self._repository(), {"rfilename"}
        commit = repository.at(self.parts["rev"] or "main")
        keys |= {"size", "blobId", "lfs"} if "blobs" in self.query else set()
        entries = [blob.entry(path) for path, blob in sorted(commit.files.items())]
        siblings = [{key: value for key, value in entry.items() if key in keys} for entry in entries]
        info = {"id": repository.repo_id, "sha": commit.oid, "private": repository.private, "gated": False, "tags": []}
        return {**info, "siblings": siblings}

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def _tree(self) -> object:
        commit, base = self._repository().at(self.parts["rev"]), f"{self.parts['path']}/".lstrip("/")
        paths = sorted(path for path in commit.files if path.startswith(base))
        if base and not paths:
            raise HubError(404, f"{self.parts['path']} does not exist", "EntryNotFound")
        folders = {path[:end] for path in paths for end in range(len(base), len(path)) if path[end] == "/"}
        entries = [{"type": "directory", "path": folder, "oid": commit.oid} for folder in sorted(folders)]
        entries += [commit.files[path].entry(path) for path in paths]
        deep = self.query.get("recursive") == ["true"]
        return [entry for entry in entries if deep or "/" not in entry["path"][len(base) :]]

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def _branch(self) -> object:
        repository, branch = self._repository(), self.parts["branch"]
        if branch in repository.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        repository.refs[branch] = repository.at(json.loads(self.body).get("startingPoint", "main")).oid
        return {}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def _preupload(self) -> object:
        committed, files = self._repository().at(self.parts["rev"]).files, []
        for wanted in json.loads(self.body)["files"]:
            lfs = wanted["path"].endswith(LFS_SUFFIXES) or wanted["size"] > LFS_SIZE
            oid = {"oid": committed[wanted["path"]].etag} if wanted["path"] in committed else {}
            mode = "lfs" if lfs else "regular"
            files.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def _lfs_batch(self) -> object:
        """Ask only for the objects that are not here yet: that is how a broken upload is taken up again."""
        repository, objects = self._repository(), json.loads(self.body)["objects"]
        for wanted in objects:
            oid = wanted["oid"]
            if oid not in repository.objects:
                repository.announced[oid] = wanted["size"]
                upload = f"{self.hub.url}/lfs/{repository.repo_id}/{oid}?signature={self.hub.secret}"
                verify = f"{self.hub.url}/{repository.repo_id}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{repo}/{oid}")
    def _lfs_put(self) -> object:
        """The storage behind the Hub is sent no token, so its address carries a signature."""
        repo_id, oid = self.parts["repo"], self.parts["oid"]
        if self.query.get("signature") != [self.hub.secret]:
            raise HubError(403, "SignatureDoesNotMatch")
        repository = self.hub.repositories[repo_id]
        if len(self.body) != repository.announced[oid] or hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadDigest: the content is not what was announced")
        repository.objects[oid] = self.body
        return b""

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def _lfs_verify(self) -> object:
        repository, wanted = self._repository(), json.loads(self.body)
        if len(repository.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object not found")
        repository.verified.append(wanted["oid"])
        return {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def _commit(self) -> object:
        """A commit on a branch, which must still be at the parent; a pull request opens a branch of its own there."""
        repository, ref, message = self._repository(), self.parts["rev"], ""
        operations = [json.loads(line) for line in self.body.splitlines()]
        parent = self._parent(repository, ref, operations)
        files = dict(parent.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value.get("path", "").rstrip("/")
            if key == "header":
                message = f"{value['summary']}\n\n{value['description']}".strip()
            elif key == "file":
                files[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in repository.objects:
                    reason = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                    raise HubError(400, f"{reason} Offending file: {path}")
                files[path] = Blob(repository.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = {p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))}
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {p: blob for p, blob in files.items() if p not in gone}
            else:
                raise HubError(501, f"no such operation in the stand-in: {key}")
        files |= {path: Blob(data, files[path].lfs) for path, data in self.hub.take_damage(files).items()}
        number = sum(name.startswith("refs/pr/") for name in repository.refs) + 1
        page = f"{self.hub.url}/{repository.repo_id}"
        pull = {"pullRequestUrl": f"{page}/discussions/{number}"} if "create_pr" in self.query else {}
        if not pull and ref not in repository.refs:
            raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        oid = repository.add_commit(f"refs/pr/{number}" if pull else ref, files, message).oid
        return {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}", **pull}

    def _parent(self, repository: Repository, ref: str, operations: list[Any]) -> Commit:
        """The commit to go on from, which the header may name by its hash or the first seven characters of it."""
        latest = repository.at(ref)
        wanted = next((one["value"].get("parentCommit") for one in operations if one["key"] == "header"), None)
        if wanted is None or latest.oid.startswith(wanted):
            return latest
        if "create_pr" not in self.query:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        known = [commit for oid, commit in repository.commits.items() if oid.startswith(wanted)]
        if not known:
            raise HubError(404, f"Invalid rev id: {wanted}", "RevisionNotFound")
        return known[0]

    @route("GET", "/{repo}/resolve/{rev}/(?P<path>.+)")
    def _resolve(self) -> object:
        commit, path = self._repository().at(self.parts["rev"]), self.parts["path"]
        self.out["X-Repo-Commit"] = commit.oid
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob, size = commit.files[path], len(commit.files[path].data)
        self.out |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        self.out |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)} if blob.lfs else {}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return blob.data
        start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        stop = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        self.status = 206 if start < stop else 416
        self.out["Content-Range"] = f"bytes {start}-{stop - 1}/{size}" if start < stop else f"bytes */{size}"
        return blob.data[start:stop]


def main() -> None:
    """Serve until interrupted, to try the client by hand."""
    parser = argparse.ArgumentParser(description=HubServer.__doc__)
    parser.add_argument("--port", type=int, default=0)
    with HubServer(port=parser.parse_args().port) as hub, contextlib.suppress(KeyboardInterrupt):
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
