"""A stand-in of the part of the Hugging Face Hub's HTTP API that uploading a folder and fetching files use, on 127.0.0.1."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "main"


@dataclass
class Repository:
    """Branches and the files that lie on each."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {MAIN: {".gitattributes": b""}})
    large: set[str] = field(default_factory=set)  # files that came by LFS
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches[MAIN]

    @property
    def oid(self) -> str:
        return self.commit_of(MAIN)

    def commit_of(self, branch: str) -> str:
        return hashlib.sha1(f"{branch} {len(self.messages)}".encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows; tests read it and set it."""

    tokens: dict[str, tuple[str, bool]] = field(default_factory=dict)  # token -> its user, and whether it may write
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_suffix: str = ".safetensors"
    answers: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # part of a path -> what is answered there instead
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **also: str) -> None:
        self.status, self.message, self.code, self.also = status, message, code, also


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The server, as long as the block lasts; `hub.endpoint` is where."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.fetched: dict[str, str] = {}
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for part, (status, message) in self.hub.answers.items():
                if part in path:
                    raise Refused(status, message)
            answer = self._routed(path, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(200)
            for name, value in self.fetched.items():
                self.send_header(name, value)
        except Refused as refused:
            content = json.dumps({"error": refused.message, **refused.also}).encode()
            self.send_response(refused.status)
            self.send_header("X-Error-Message", refused.message)
            if refused.code:
                self.send_header("X-Error-Code", refused.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store = []
        while size := int(self.rfile.readline(), 16):
            store.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(store)

    def _routed(self, path: str, body: bytes) -> Any:
        name = r"(?P<name>[^/]+/[^/]+?)"
        routes: list[tuple[str, Callable[..., Any]]] = [
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", lambda body: {"warnings": [], "errors": []}),
            (rf"GET /api/models/{name}(/revision/(?P<branch>.+))?", self._info),
            (rf"POST /api/models/{name}/branch/(?P<branch>.+)", self._branch),
            (rf"POST /api/models/{name}/preupload/(?P<branch>.+)", self._preupload),
            (rf"POST /api/models/{name}/commit/(?P<branch>.+)", self._commit),
            (rf"POST /{name}\.git/info/lfs/objects/batch", self._batch),
            (rf"(?:GET|HEAD) /{name}/resolve/(?P<branch>.+)/(?P<file>[^/]+)", self._resolve),
            (r"PUT /objects/(?P<oid>[0-9a-f]{64})", self._store),
        ]
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(body, **match.groupdict())
        raise Refused(404, f"the stand-in knows no {self.command} {path}")

    def _user(self, *, writes: bool) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid username or password.")
        user, may_write = self.hub.tokens[token]
        if writes and not may_write:
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        return user

    def _repository(self, name: str, *, writes: bool, branch: str | None = None) -> Repository:
        found = self.hub.repositories.get(name)
        anonymous = found is not None and not found.private and not writes and not self.headers.get("Authorization")
        user = "" if anonymous else self._user(writes=writes)
        if found is None or (found.private and name.split("/")[0] != user):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if writes and name.split("/")[0] != user:
            raise Refused(403, f"{user} may not write to {name}")
        if branch is not None and branch not in found.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return found

    def _create(self, body: bytes) -> Any:
        wanted = json.loads(body)
        user = self._user(writes=True)
        owner = wanted["organization"] or user
        if owner != user:
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.endpoint}/{name}")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[name] = Repository(private)
        return {"url": f"{self.hub.endpoint}/{name}", "name": name}

    def _info(self, body: bytes, name: str, branch: str | None) -> Any:
        found = self._repository(name, writes=False, branch=branch or MAIN)
        files = found.branches[branch or MAIN]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": found.oid, "private": found.private, "tags": [], "siblings": siblings}

    def _resolve(self, body: bytes, name: str, branch: str, file: str) -> bytes:
        found = self._repository(name, writes=False, branch=branch)
        if file not in found.branches[branch]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = found.branches[branch][file]
        self.fetched = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": found.commit_of(branch)}
        return content

    def _branch(self, body: bytes, name: str, branch: str) -> Any:
        found = self._repository(name, writes=True)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = dict(found.files)
        return {}

    def _preupload(self, body: bytes, name: str, branch: str) -> Any:
        present = self._repository(name, writes=True, branch=branch).branches[branch]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(self.hub.large_suffix)
            content = present.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _blob(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def _batch(self, body: bytes, name: str) -> Any:
        self._repository(name, writes=True)
        wanted = json.loads(body)["objects"]
        return {
            "transfer": "basic",
            "objects": [
                {**wish, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{wish['oid']}", "header": {}}}}
                for wish in wanted
            ],
        }

    def _store(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content is not what its hash says")
        self.hub.objects[oid] = body
        return {}

    def _commit(self, body: bytes, name: str, branch: str) -> Any:
        found = self._repository(name, writes=True, branch=branch)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                found.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                found.branches[branch][value["path"]] = self.hub.objects[value["oid"]]
                found.large.add(value["path"])
            else:
                raise Refused(400, f"the stand-in cannot do {operation['key']}")
        found.messages.append(header["value"]["summary"])
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{found.oid}", "commitOid": found.oid}


def _blob(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
