"""
A double of the Hugging Face Hub: an HTTP server with the requests that huggingface_hub makes for uploads and downloads.

Large files go through Git LFS, as without the package hf_xet: its protocol has no server that runs here.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_double"
REGULAR = (".md", ".yaml", ".json")
"""Suffixes of files that are committed as they are. Others are large files."""


@dataclass
class Repository:
    """
    A repository with one branch, ``main``.

    :param private: Whether reading needs the token.
    :param commits: Message and files (content by name) of each commit, the last one last.
    """

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("initial commit", {".gitattributes": b""})])

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the last commit."""
        return self.commits[-1][1]

    @property
    def sha(self) -> str:
        """Hash of the last commit."""
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubDouble:
    """
    The state of the server.

    :param url: Address of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.user_agents: set[str] = set()

    def add(self, repo_id: str, files: dict[str, bytes]) -> None:
        """
        :param repo_id: Name of a repository to create.
        :param files: Its files.
        """
        self.repositories[repo_id] = Repository(commits=[("by hand", files)])


class Refusal(Exception):
    """
    A response with an error.

    :param status: Status of HTTP.
    :param code: The Hub's code of the error, which huggingface_hub turns into an exception.
    :param message: The Hub's message.
    :param body: Further entries of the response.
    """

    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: HubDouble

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Find the method for the path and send what it returns: JSON, or bytes with headers."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.user_agents.add(self.headers.get("User-Agent", ""))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        status, headers = 200, {}
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    content = answer(self, **match.groupdict())
                    break
            else:
                raise Refusal(404, message=f"the double does not know {self.command} {path}")
            if isinstance(content, tuple):
                content, headers = content
            else:
                content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        except Refusal as refusal:
            status, headers = refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            content = json.dumps({"error": refusal.message, **refusal.body}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- answers

    def needs_token(self) -> None:
        """:raises Refusal: for a request without the token."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, message="Invalid username or password.")

    def repository(self, repo: str, revision: str = "main") -> Repository:
        """:raises Refusal: as the Hub for one that is missing or private."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refusal(401, "RepoNotFound", "Repository not found")
        if revision not in ("main", found.sha):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> Any:
        self.needs_token()
        return {"type": "user", "name": "me", "orgs": []}

    def create(self) -> Any:
        self.needs_token()
        request = json.loads(self.body)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        if repo in self.hub.repositories:
            raise Refusal(409, message="You already created this model repo", url=f"{self.hub.url}/{repo}")
        # Clients send `visibility`, older ones `private`.
        self.hub.repositories[repo] = Repository(
            private=request.get("visibility") == "private" or bool(request.get("private"))
        )
        return {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"}

    def validate(self) -> Any:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        assert isinstance(metadata["tags"], list)
        assert metadata["model-index"][0]["results"][0]["metrics"]
        return {"errors": [], "warnings": []}

    def info(self, repo: str, revision: str = "main") -> Any:
        found = self.repository(repo, revision)
        return {"id": repo, "sha": found.sha, "siblings": [{"rfilename": name} for name in found.files]}

    def tree(self, repo: str, revision: str) -> Any:
        files = self.repository(repo, revision).files
        return [{"type": "file", "path": name, "size": len(files[name]), "oid": etag(files[name])} for name in files]

    def preupload(self, repo: str, revision: str) -> Any:
        self.needs_token()
        self.repository(repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "regular" if path.endswith(REGULAR) else "lfs" for path in paths}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def batch(self, repo: str) -> Any:
        self.needs_token()
        self.repository(repo)
        objects = json.loads(self.body)["objects"]
        answer = [one | {"actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}} for one in objects]
        return {"transfer": "basic", "objects": answer}

    def put(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid, "the content is not that of the hash"
        self.hub.large[oid] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        self.needs_token()
        found = self.repository(repo, revision)
        files, message = dict(found.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(item["key"])
        if "create_pr=1" in self.path:
            address = f"{self.hub.url}/{repo}"
            return {
                "commitUrl": f"{address}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "pullRequestUrl": f"{address}/discussions/1",
            }
        found.commits.append((message, files))
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{found.sha}", "commitOid": found.sha, "pullRequestUrl": None}

    def file(self, repo: str, revision: str, name: str) -> Any:
        found = self.repository(repo, revision)
        if name not in found.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        return found.files[name], {"X-Repo-Commit": found.sha, "ETag": f'"{etag(found.files[name])}"'}


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(?P<oid>\w+)", Handler.put),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("HEAD GET", f"/{REPO}/resolve/{REVISION}/(?P<name>.+)", Handler.file),
]


def etag(content: bytes) -> str:
    """:return: A name of a content."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_double() -> Iterator[HubDouble]:
    """:return: A context with a running double."""
    handler = type("HandlerOfOneDouble", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = HubDouble(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
