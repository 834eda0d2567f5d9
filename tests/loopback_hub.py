"""A Hugging Face Hub on 127.0.0.1, for tests: the real `huggingface_hub` client, `hf`, timm and `datasets` talk to it.

It speaks the part of the Hub's HTTP protocol that huggingface_hub 2.x uses for model and dataset repositories (read in
`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`, `_http.py` of the client): accounts and tokens,
repositories, preupload and LFS uploads, NDJSON commits, tags, listings, and downloads. Large files are redirected to a
second port that stands for the CDN: another origin, which must never see a token. Everything lives in memory and ends
with the `with` block. Xet storage is not offered, so clients run with HF_HUB_DISABLE_XET=1.

    with LoopbackHub() as hub:
        hub.add("org/model", {"config.json": b"{}"})
        hub.fail("truncate", "GET /cdn/")  # the next download from the CDN ends half-way
        hub.python(["-c", "import huggingface_hub; ..."], cache_dir)  # HF_ENDPOINT is read at import: use a new process
        assert hub.requests("POST", "/commit/") == []
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote

import fresh_python

HURRY = "import time; time.sleep = lambda seconds, sleep=time.sleep: sleep(seconds / 20)\n"
"""A client's program that begins with this waits a twentieth of the time before it tries again."""
REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
RepoType = Literal["model", "dataset"]
FaultKind = Literal["drop", "lose_answer", "delay", "status", "truncate", "corrupt"]

LFS_PATTERNS = ("*.safetensors", "*.parquet", "*.arrow", "*.bin", "*.npz", "*.pt", "*.pth", "*.zip", "*.tar.gz")
LFS_THRESHOLD = 10 * 1024**2  # bytes; larger files are LFS files whatever their name
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself stores for an LFS file."""
        size = len(self.data)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def lfs_info(self, name_of_hash: str) -> dict[str, Any] | None:
        """Listings and repository information call the hash by different names."""
        info = {name_of_hash: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return info if self.lfs else None


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    type: RepoType
    id: str
    private: bool = False
    gated_for: set[str] | None = None
    """Names of the accounts that may download; None means that the repository is not gated."""
    commits: dict[str, Commit] = field(default_factory=dict)
    """All of `main`, the only branch, in order."""
    tags: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    """Content by sha256, of commits past and to come."""

    @property
    def head(self) -> Commit:
        return list(self.commits.values())[-1]

    def resolve(self, revision: str) -> Commit:
        """The commit of the branch, a tag or a (shortened) commit hash."""
        sha = self.head.sha if revision == "main" else self.tags.get(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, files: dict[str, Blob], title: str) -> Commit:
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        identity = f"{self.type} {self.id} {list(self.commits)} {title}\n{listing}"
        sha = hashlib.sha1(identity.encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.commits[sha] = Commit(sha, title, date, files)
        return self.commits[sha]


class Account(NamedTuple):
    name: str
    namespaces: tuple[str, ...]
    """Those that it may write to, and whose private repositories it sees."""


@dataclass
class Fault:
    """Something that goes wrong with the next `count` requests whose "METHOD /path" matches a pattern.

    drop: the connection closes before the request is acted upon. lose_answer: it is acted upon, then the connection
    closes. delay: the answer comes `seconds` late. status: the answer is that status, with a
    Retry-After of so many seconds if any. truncate: only half of the body
    passes, and the connection closes. corrupt: the byte in the middle of the body is another one. The body of a PUT is
    what the client sends, otherwise it is the answer.
    """

    kind: FaultKind
    pattern: str
    count: int = 1
    status: int = 503
    retry_after: int | None = None
    seconds: float = 3.0

    def damage(self, body: bytes) -> bytes:
        middle = len(body) // 2
        if self.kind == "truncate":
            return body[:middle]
        if self.kind == "corrupt" and body:
            return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        return body


@dataclass(frozen=True)
class Request:
    origin: Literal["hub", "cdn"]
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200, **headers: str) -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class HubError(Exception):
    """An error as the Hub reports it: status, message, and X-Error-Code, from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.response = Response.of({"error": message}, status, **named)


Endpoint = Callable[["LoopbackHub", Request, dict[str, str]], Response]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []
REPO = r"/api/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
CDN = r"/cdn/(?P<type>model|dataset)s/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
FILES = r"/(?:(?P<type>dataset)s/)?(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class LoopbackHub:
    """The Hub itself; `url` is its HF_ENDPOINT, `token` may write to the namespaces `ada` and `org`."""

    def __init__(self) -> None:
        self.token, self.read_token = (f"hf_{secrets.token_hex(17)}" for _ in range(2))
        self.accounts = {self.token: Account("ada", ("ada", "org")), self.read_token: Account("grace", ())}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[Request, int]] = []
        """Every request with the status of its answer, 0 when the connection was dropped."""
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self.servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self) -> LoopbackHub:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # For the tests: prepare, break, look, and run clients.

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: RepoType = "model", private: bool = False) -> Repo:
        """Commit `files` on top of what the repository holds; it is created when it does not exist."""
        with self.lock:
            repo = self.repos.get((repo_type, repo_id)) or self.create(repo_type, repo_id, private)
            blobs = {path: Blob(data, self.wants_lfs(path, len(data), data[:512])) for path, data in files.items()}
            repo.lfs_objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
            repo.commit(repo.head.files | blobs, "Add files")
            return repo

    def repo(self, repo_id: str, repo_type: RepoType = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def fail(self, kind: FaultKind, pattern: str, **options: Any) -> Fault:
        self.faults.append(Fault(kind, pattern, **options))
        return self.faults[-1]

    def requests(self, method: str = "", pattern: str = "", part: slice = slice(None)) -> list[tuple[Request, int]]:
        """What was asked, with the status of the answer; in that part of the log."""
        return [(r, s) for r, s in self.log[part] if method in ("", r.method) and re.search(pattern, r.path)]

    def env(self, cache_dir: Path | str, token: str | None = None, **more: str) -> dict[str, str]:
        """Environment of a client: this Hub and no other host, its home in `cache_dir`, no token unless given."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and "proxy" not in name.lower() and name not in ("AGENT", "AI_AGENT")
        }
        python_path = os.pathsep.join(filter(None, (str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH"))))
        switches = ("DISABLE_XET", "DISABLE_UPDATE_CHECK", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS")
        return {
            **inherited,
            **{f"HF_HUB_{switch}": "1" for switch in switches},
            **({"HF_TOKEN": token} if token else {}),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache_dir),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": python_path,
            **more,
        }

    def run(self, command: list[str], cache_dir: Path | str, **env: Any) -> subprocess.CompletedProcess[str]:
        """Run a client to its end, away from this folder; both its streams are text."""
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, env=self.env(cache_dir, **env), cwd=Path(cache_dir).parent, **options)

    def python(self, arguments: list[str], cache_dir: Path | str, **env: Any) -> subprocess.CompletedProcess[str]:
        """Run Python with `arguments`, as :meth:`run` does a client."""
        return fresh_python.run(arguments, self.env(cache_dir, **env), Path(cache_dir).parent)

    # Answering.

    def take_fault(self, asked: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.pattern, asked):
                    fault.count -= 1
                    return fault
        return None

    def respond(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, endpoint in ROUTES:
            if method == wanted and (match := pattern.fullmatch(request.path)):
                found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                try:
                    with self.lock:
                        return endpoint(self, request, {"type": "model", **found})
                except HubError as error:
                    return error.response
        return HubError(404, f"The loopback Hub does not know {request.method} {request.path}").response

    def account(self, request: Request, writes_to: str | None = None) -> Account | None:
        """Who asks, None when there is no token; refused when `writes_to` is given and is not theirs to change."""
        account = None
        if request.token is not None and (account := self.accounts.get(request.token)) is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        if writes_to and account is None:
            raise HubError(401, "Invalid username or password.")
        if writes_to and account and writes_to.split("/")[0] not in account.namespaces:
            raise HubError(403, f"You don't have the required permissions to write to {writes_to}")
        return account

    def find(self, request: Request, where: dict[str, str], write: bool = False) -> Repo:
        """The repository of a URL, if this client may see it (`write`: may change it)."""
        repo = self.repos.get((where["type"], where["repo"]))
        account = self.account(request)
        trusted = account is not None and where["repo"].split("/")[0] in account.namespaces
        if repo is None or (repo.private and not trusted):
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        self.account(request, repo.id if write else None)
        return repo

    def create(self, repo_type: RepoType, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private)
        repo.commit({".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")
        return repo

    def page(self, repo_type: RepoType, repo_id: str) -> str:
        return f"{self.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"

    def cdn(self, repo: Repo, oid: str) -> str:
        """Where an LFS object is uploaded and downloaded; like a signed address it needs no token."""
        return f"{self.cdn_url}/cdn/{repo.type}s/{repo.id}/{oid}"

    def wants_lfs(self, path: str, size: int, sample: bytes) -> bool:
        named = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
        return size > 0 and (named or size > LFS_THRESHOLD or b"\0" in sample)

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request, _: dict[str, str]) -> Response:
        account = self.account(request)
        if account is None:
            raise HubError(401, "Invalid username or password.")
        role = {"type": "access_token", "accessToken": {"role": "write" if account.namespaces else "read"}}
        organizations = [{"type": "org", "name": name} for name in account.namespaces[1:]]
        return Response.of({"type": "user", "name": account.name, "orgs": organizations, "auth": role})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request, _: dict[str, str]) -> Response:
        asked = request.json
        repo_type: RepoType = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or getattr(self.account(request), 'name', '')}/{asked['name']}"
        self.account(request, writes_to=repo_id)
        answer = {"url": self.page(repo_type, repo_id)}
        if (repo_type, repo_id) in self.repos:
            return Response.of({**answer, "error": f"You already created this {repo_type} repo"}, 409)
        self.create(repo_type, repo_id, asked.get("visibility") == "private")
        return Response.of(answer)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request, _: dict[str, str]) -> Response:
        asked = request.json
        where = {"type": asked.get("type") or "model", "repo": f"{asked['organization']}/{asked['name']}"}
        repo = self.find(request, where, write=True)
        del self.repos[repo.type, repo.id]
        return Response.of({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request, _: dict[str, str]) -> Response:
        """Only the frame is looked at: the standard library has no YAML."""
        card = request.json["content"]
        errors, warnings = [], []
        if not card.startswith("---\n"):
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
        elif "\n---\n" not in card or "\t" in card.split("\n---\n")[0]:
            errors = [{"message": "the front matter has a tab or no end"}]
        return Response.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("POST", REPO + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, where: dict[str, str]) -> Response:
        files = self.find(request, where, write=True).resolve(where["revision"]).files
        answers = []
        for asked in request.json["files"]:
            lfs = self.wants_lfs(asked["path"], asked["size"], base64.b64decode(asked["sample"]))
            answer: dict[str, Any] = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular"}
            known = files.get(asked["path"])
            if known is not None and known.lfs == lfs:
                answer["oid"] = known.sha256 if lfs else known.oid
            answers.append({**answer, "shouldIgnore": False})
        return Response.of({"files": answers})

    @route("POST", FILES + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where, write=True)
        objects = []
        for wanted in request.json["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs_objects:
                upload = {"href": self.cdn(repo, wanted["oid"]), "header": {}}
                verify = {"href": f"{self.url}/api/{repo.type}s/{repo.id}/lfs-verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return Response.of({"transfer": "basic", "objects": objects})

    @route("POST", REPO + "/lfs-verify")
    def lfs_verify(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where, write=True)
        oid, data = request.json["oid"], repo.lfs_objects.get(request.json["oid"], b"")
        if len(data) != request.json["size"] or hashlib.sha256(data).hexdigest() != oid:
            repo.lfs_objects.pop(oid, None)
            raise HubError(422, f"The uploaded object is not {oid}")
        return Response.of({})

    @route("POST", REPO + "/commit/main")
    def commit(self, request: Request, where: dict[str, str]) -> Response:
        """All of the commit or nothing: the new tree is complete before the branch moves."""
        repo = self.find(request, where, write=True)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if not repo.head.sha.startswith(header["value"].get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.head.files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"], validate=True))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in repo.lfs_objects:
                    raise HubError(400, f"{path} points to an LFS object that was never uploaded: {value['oid']}")
                files[path] = Blob(repo.lfs_objects[value["oid"]], lfs=True)
            else:
                gone = [known for known in files if known == path or known.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {known: blob for known, blob in files.items() if known not in gone}
        commit = repo.commit(files, header["value"]["summary"])
        url = f"{self.page(repo.type, repo.id)}/commit/{commit.sha}"
        return Response.of({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    @route("GET", REPO + "(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where)
        commit = repo.resolve(where.get("revision", "main"))
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in request.query:
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid, "lfs": blob.lfs_info("sha256")}
        gated = "manual" if repo.gated_for is not None else False
        state = {"id": repo.id, "sha": commit.sha, "lastModified": commit.date, "private": repo.private, "gated": gated}
        return Response.of({**state, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    @route("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, request: Request, where: dict[str, str]) -> Response:
        commit = self.find(request, where).resolve(where["revision"])
        folder = where["path"].rstrip("/") + "/" if "path" in where else ""
        entries = _entries(commit, request.query.get("expand") == ["true"])
        inside = [entry for path, entry in entries.items() if path.startswith(folder)]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {where['revision']}", "EntryNotFound")
        deep = request.query.get("recursive") == ["true"]
        return Response.of([entry for entry in inside if deep or "/" not in entry["path"][len(folder) :]])

    @route("POST", REPO + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, where: dict[str, str]) -> Response:
        commit = self.find(request, where).resolve(where["revision"])
        asked = parse_qs(request.body.decode())
        entries = _entries(commit, asked.get("expand") == ["true"])
        return Response.of([entries[path] for path in asked["paths"] if path in entries])

    @route("GET", REPO + "/refs")
    def refs(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.sha}
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in repo.tags.items()]
        return Response.of({"branches": [main], "tags": tags, "converts": []})

    @route("POST", REPO + "/tag/(?P<revision>[^/]+)")
    def create_tag(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where, write=True)
        name = request.json["tag"]
        if name in repo.tags:
            raise HubError(409, f"Tag reference exists already: {name}")
        repo.tags[name] = repo.resolve(where["revision"]).sha
        return Response.of({})

    @route("DELETE", REPO + "/tag/(?P<name>[^/]+)")
    def delete_tag(self, request: Request, where: dict[str, str]) -> Response:
        if self.find(request, where, write=True).tags.pop(where["name"], None) is None:
            raise HubError(404, f"Invalid rev id: {where['name']}", "RevisionNotFound")
        return Response.of({})

    @route("GET", FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, where: dict[str, str]) -> Response:
        repo = self.find(request, where)
        account = self.account(request)
        if repo.gated_for is not None and (account is None or account.name not in repo.gated_for):
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if account else 401, message, "GatedRepo")
        commit = repo.resolve(where["revision"])
        known = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(where["path"])
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", known)
        if not blob.lfs:
            return _ranged(request, blob.data, {**known, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        location = f"{self.cdn(repo, blob.sha256)}?filename={quote(where['path'], safe='')}"
        return Response(302, b"", {**known, **linked, "ETag": f'"{blob.sha256}"', "Location": location})

    @route("PUT", CDN)
    def store(self, request: Request, where: dict[str, str]) -> Response:
        self.repos[where["type"], where["repo"]].lfs_objects[where["oid"]] = request.body
        return Response(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("GET", CDN)
    def download(self, request: Request, where: dict[str, str]) -> Response:
        data = self.repos[where["type"], where["repo"]].lfs_objects[where["oid"]]
        return _ranged(request, data, {"ETag": f'"{where["oid"]}"'})


def _entries(commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Everything in a commit's tree, folders included, by path."""
    folders = {str(folder) for path in commit.files for folder in PurePosixPath(path).parents if folder.name}
    entries: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        for path in sorted(folders)
    }
    for path, blob in commit.files.items():
        entries[path] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
        entries[path] |= {"lfs": blob.lfs_info("oid")} if blob.lfs else {}
    if expand:
        for entry in entries.values():
            entry["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
    return entries


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """The whole of `data`, or the part that the Range header asks for."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Response(200, data, headers)
    first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
    if first > last:
        return Response(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Response(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LoopbackHub, origin: Literal["hub", "cdn"]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.hub = hub
        self.origin = origin


class _Connection(BaseHTTPRequestHandler):
    """One client connection: reads requests, asks the hub for the answer, and breaks it as the faults say."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """The hub keeps its own log."""

    def serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = hub.take_fault(f"{self.command} {path}")
        uploads = self.command == "PUT"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = fault.damage(body) if fault and uploads else body
        request = Request(self.server.origin, self.command, path, parse_qs(query), headers, sent)
        if fault and fault.kind == "drop":
            response = Response(0)
        elif fault and fault.kind == "status":
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            response = HubError(fault.status, "a fault of the loopback Hub", headers=wait).response
        elif path.startswith("/cdn/") != (request.origin == "cdn"):
            response = HubError(404, f"{request.origin} does not serve {path}").response
        else:
            response = hub.respond(request)
        answered = fault is None or fault.kind not in ("drop", "lose_answer")
        hub.log.append((request, response.status if answered else 0))
        if fault and fault.kind == "delay":
            hub.closing.wait(fault.seconds)
        if not answered:
            return self.hang_up()
        passing = fault.damage(response.body) if fault and not uploads else response.body
        try:
            self.send_response(response.status)
            for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(passing)
        except ConnectionError:  # the client had enough of waiting
            self.close_connection = True
        if len(passing) < len(response.body):
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
