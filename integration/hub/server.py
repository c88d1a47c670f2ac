"""A small Hub for tests: what `huggingface_hub` calls of the Hugging Face Hub's HTTP API to push and pull models.

Nothing of the client is patched, so a push and a reload through this server take the road that a user's take. Uploads
go through Git LFS: Xet has a wire format of its own, so the clients run with `HF_HUB_DISABLE_XET=1`. By hand:
`python integration/hub/server.py 8000` prints the environment that a client needs.
"""

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = {".bin", ".ckpt", ".gguf", ".h5", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors"}
LFS_SIZE = 10 * 2**20  # the Hub refuses larger files outside LFS
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class File:
    """One version of one file. Its `oid` is what git (or LFS) would call it, which is what the client compares."""

    data: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.blob_id

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.data)}\n"
        return text.encode()


@dataclass
class Repo:
    """A repository: a tree for each commit, and the commit that each branch is at."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, File], message: str) -> str:
        blobs = sorted((path, file.blob_id) for path, file in tree.items())
        parts = [len(self.commits), self.branches.get(branch), message, blobs]
        oid = hashlib.sha1(json.dumps(parts).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid


class HubError(Exception):
    """An answer with the headers from which `huggingface_hub` chooses the exception it raises."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.commit, self.body = status, message, code, commit, body


class Answer(NamedTuple):
    """What a route answers: bytes as they are, anything else as JSON. A header that is None is left out."""

    body: Any
    status: int = 200
    headers: dict[str, str | None] = {}


class HubServer(ThreadingHTTPServer):
    """The server and its state, all in memory. `user` is the namespace of the only account, `token` opens it."""

    daemon_threads = True

    def __init__(self, port: int = 0, user: str = "user", token: str | None = None):
        super().__init__(("127.0.0.1", port), Handler)
        self.user = user
        self.token = token or f"hf_{secrets.token_hex(16)}"
        self.signature = secrets.token_hex(16)  # stands for the signed storage addresses, which carry no bearer token
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by sha256
        self.requests: list[tuple[str, str, int]] = []  # (method, path, status), in order
        self.unknown: list[str] = []  # requests that this server has no route for: tests want none

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What the repository holds, for a test to look at without a client."""
        repo = self.repos[repo_id]
        return {path: file.data for path, file in repo.commits[repo.branches[revision]].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    # (method, path, needs a token, the Handler's method); {repo} may be "name" or "namespace/name"
    ROUTES = [
        ("POST", r"/api/repos/create", True, "create_repo"),
        ("POST", r"/api/validate-yaml", False, "validate_yaml"),
        ("GET", r"/api/whoami-v2", True, "whoami"),
        ("POST", r"/api/models/(?P<repo>.+?)/preupload/(?P<rev>[^/]+)", True, "preupload"),
        ("POST", r"/api/models/(?P<repo>.+?)/commit/(?P<rev>[^/]+)", True, "commit"),
        ("POST", r"/api/models/(?P<repo>.+?)/branch/(?P<rev>[^/]+)", True, "create_branch"),
        ("GET", r"/api/models/(?P<repo>.+?)/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", True, "tree"),
        ("GET", r"/api/models/(?P<repo>.+?)/revision/(?P<rev>[^/]+)", True, "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)", True, "model_info"),
        ("POST", r"/(?P<repo>.+?)\.git/info/lfs/objects/batch", True, "lfs_batch"),
        ("PUT", r"/lfs/(?P<signature>\w+)/(?P<oid>[0-9a-f]{64})", False, "lfs_upload"),
        ("POST", r"/(?P<repo>.+?)\.git/info/lfs/verify", True, "lfs_verify"),
        ("HEAD", r"/(?P<repo>.+?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", True, "resolve"),
        ("GET", r"/(?P<repo>.+?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", True, "resolve"),
    ]

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `server.requests` is the log."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            self.body = self.read_body()  # always: an unread body would be taken for the connection's next request
            method, groups = self.route(url.path)
            with self.server.lock:
                answer = getattr(self, method)(**groups)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message, "X-Repo-Commit": error.commit}
            answer = Answer({"error": error.message} | error.body, error.status, headers)
        self.reply(*answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def route(self, path: str) -> tuple[str, dict[str, str | None]]:
        for verb, pattern, needs_token, method in self.ROUTES:
            if verb == self.command and (match := re.fullmatch(pattern, path)):
                if needs_token:
                    self.check_token(match.groupdict().get("repo"))
                return method, {key: value and unquote(value) for key, value in match.groupdict().items()}
        self.server.unknown.append(f"{self.command} {self.path}")
        raise HubError(404, f"This test server has no {self.command} {path}")

    def check_token(self, repo: str | None) -> None:
        sent = self.headers.get("Authorization")
        if sent == f"Bearer {self.server.token}":
            return
        if sent is None:  # as the Hub answers for a private repository: it does not tell it from a missing one
            raise HubError(401, "Invalid username or password.", code="RepoNotFound" if repo else None)
        raise HubError(401, "Invalid credentials in Authorization header")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def reply(self, body: Any, status: int, headers: dict[str, str | None]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.requests.append((self.command, urlsplit(self.path).path, int(status)))
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # What the repositories hold

    def find_repo(self, repo: str) -> Repo:
        if repo not in self.server.repos:
            raise HubError(404, "Repository not found", code="RepoNotFound")
        return self.server.repos[repo]

    def find_commit(self, repo: str, rev: str | None) -> tuple[str, dict[str, File]]:
        found = self.find_repo(repo)
        oid = found.branches.get(rev or "main", rev)
        if oid not in found.commits:
            raise HubError(404, f"Invalid rev id: {rev}", code="RevisionNotFound")
        return oid, found.commits[oid]

    # Accounts and repositories

    def whoami(self) -> Answer:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Answer({"type": "user", "id": "1", "name": self.server.user, "orgs": [], "auth": access})

    def create_repo(self) -> Answer:
        request = json.loads(self.body)
        if request.get("type", "model") != "model":
            raise HubError(400, "This test server keeps models only")
        owner = request.get("organization") or self.server.user
        if owner != self.server.user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{request['name']}"
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            raise HubError(409, "You already created this model repo", **answer)
        self.server.repos[repo_id] = Repo()
        self.server.repos[repo_id].commit("main", {}, "initial commit")
        return Answer(answer)

    def create_branch(self, repo: str, rev: str) -> Answer:
        found = self.find_repo(repo)
        if rev in found.branches:
            raise HubError(409, f"Reference refs/heads/{rev} already exists")
        found.branches[rev], _ = self.find_commit(repo, json.loads(self.body or b"{}").get("startingPoint"))
        return Answer({}, HTTPStatus.CREATED)

    def validate_yaml(self) -> Answer:
        """The Hub's check of a model card: YAML that parses, and a `base_model` that is an id, not a local path."""
        errors, warnings, metadata = [], [], None
        front = FRONT_MATTER.match(json.loads(self.body)["content"])
        try:
            metadata = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        if metadata is None and not errors:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        elif metadata is not None and not isinstance(metadata, dict):
            errors.append({"message": "metadata must be a mapping"})
        else:
            base = (metadata or {}).get("base_model") or []
            for value in base if isinstance(base, list) else [base]:
                if not (isinstance(value, str) and MODEL_ID.fullmatch(value)):
                    message = (
                        f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.'
                    )
                    errors.append({"message": message})
        if errors:
            raise HubError(400, "Invalid metadata in README.md", errors=errors, warnings=warnings)
        return Answer({"errors": errors, "warnings": warnings})

    # Uploads: the client asks how each file should go up, sends the LFS ones, then commits

    def preupload(self, repo: str, rev: str) -> Answer:
        _, tree = self.find_commit(repo, rev)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            lfs = PurePosixPath(path).suffix in LFS_SUFFIXES or asked["size"] > LFS_SIZE
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": tree[path].oid} if path in tree else {}))
        return Answer({"files": answers})

    def lfs_batch(self, repo: str) -> Answer:
        self.find_repo(repo)
        request = json.loads(self.body)
        if request["operation"] != "upload" or "basic" not in request["transfers"]:
            raise HubError(400, "This test server takes basic LFS uploads only")
        objects = []
        for asked in request["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.server.objects:
                upload = {"href": f"{self.server.endpoint}/lfs/{self.server.signature}/{asked['oid']}"}
                verify = {"href": f"{self.server.endpoint}/{repo}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, signature: str, oid: str) -> Answer:
        if signature != self.server.signature:
            raise HubError(403, "Wrong signature")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"The upload's sha256 is not {oid}")
        self.server.objects[oid] = self.body
        return Answer(b"")

    def lfs_verify(self, repo: str) -> Answer:
        self.find_repo(repo)
        request = json.loads(self.body)
        if len(self.server.objects.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, f"No object {request['oid']} of {request['size']} bytes")
        return Answer({})

    def commit(self, repo: str, rev: str) -> Answer:
        if "create_pr" in self.query:
            raise HubError(400, "This test server has no pull requests")
        head, old = self.find_commit(repo, rev)
        if rev not in self.server.repos[repo].branches:
            raise HubError(400, f"{rev} is not a branch")
        tree, summary = dict(old), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    summary = value["summary"]
                    if value.get("parentCommit", head) != head:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    tree[value["path"]] = File(base64.b64decode(value["content"], validate=True), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.server.objects:
                        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                    tree[value["path"]] = File(self.server.objects[value["oid"]], lfs=True)
                case "deletedFile" | "deletedFolder":
                    name = value["path"].rstrip("/")
                    gone = [path for path in tree if path == name or path.startswith(f"{name}/")]
                    if not gone:
                        raise HubError(404, "A file with this name doesn't exist", code="EntryNotFound", commit=head)
                    for path in gone:
                        del tree[path]
                case key:
                    raise HubError(400, f"Unknown operation {key}")
        oid = self.server.repos[repo].commit(rev, tree, summary)
        url = f"{self.server.endpoint}/{repo}/commit/{oid}"
        return Answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # Downloads

    def model_info(self, repo: str, rev: str | None = None) -> Answer:
        oid, tree = self.find_commit(repo, rev)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": oid, "private": True, "tags": []}
        return Answer(info | {"siblings": siblings, "gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def tree(self, repo: str, rev: str, path: str | None) -> Answer:
        oid, tree = self.find_commit(repo, rev)
        prefix = f"{path.strip('/')}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(name for name in tree if name.startswith(prefix)):
            file, parts = tree[name], name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                sha = hashlib.sha1(f"{oid}:{folder}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": sha, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "oid": file.blob_id, "size": len(file.data), "path": name}
                if file.lfs:
                    entries[name]["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": len(file.pointer)}
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", code="EntryNotFound", commit=oid)
        return Answer(list(entries.values()))

    def resolve(self, repo: str, rev: str, path: str) -> Answer:
        oid, tree = self.find_commit(repo, rev)
        if path not in tree:
            raise HubError(404, "Entry not found", code="EntryNotFound", commit=oid)
        file = tree[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return Answer(file.data, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(file.data)), len(file.data) - 1)
        if first > last:
            raise HubError(416, "Range not satisfiable", commit=oid)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        return Answer(file.data[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)


if __name__ == "__main__":
    with HubServer(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        hub.serve_forever()
