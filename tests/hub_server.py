"""A stand-in for the Hub on 127.0.0.1: the HTTP calls that huggingface_hub makes to create, push to, and read a model
repository without xet (HF_HUB_DISABLE_XET=1). Everything is kept in memory; `requests` lists what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

Tree = dict[str, bytes]


class Repo:
    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id, self.private = repo_id, private
        self.commits: dict[str, Tree] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        oid = hashlib.sha1(f"{self.repo_id}/{len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> Tree:
        return self.commits[self.branches[revision]]


class HubServer:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.forbidden: tuple[str, str] | None = None
        """A handler (such as `commit`) and the repository for which it answers 403."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def add(self, repo_id: str, **files: bytes) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private=False)
        repo.commit("main", dict(files), "add files")
        return repo


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", "branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("GET")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def _dispatch(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = url.query
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for verb, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if verb == method and match:
                self.hub.requests.append(name)
                groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                repo_id = groups.pop("repo", None)
                if (name, repo_id) == self.hub.forbidden:
                    return self._error(403, "Forbidden", "you may not do that")
                if repo_id is None:
                    return getattr(self, f"_{name}")(**groups)
                if repo_id not in self.hub.repos:
                    return self._error(404, "RepoNotFound", "Repository not found")
                return getattr(self, f"_{name}")(self.hub.repos[repo_id], **groups)
        return self._error(404, "EntryNotFound", f"{method} {url.path}: no such route")

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._json(answer, 409)
        self.hub.repos[repo_id] = Repo(repo_id, asked.get("visibility") == "private")
        return self._json(answer)

    def _validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        data = yaml.safe_load(header[1]) if header else {}
        errors = [
            {"message": f"{key} must be a text"}
            for key in ("license", "base_model")
            if not isinstance(data.get(key, ""), str)
        ]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _branch(self, repo: Repo, branch: str) -> None:
        if branch in repo.branches:
            return self._json({}, 409)
        repo.branches[branch] = repo.branches["main"]
        return self._json({})

    def _preupload(self, repo: Repo, revision: str) -> None:
        lfs = (".safetensors", ".png")
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(lfs) else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, repo: Repo) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "BadRequest", "sha256 differs")
        self.hub.blobs[oid] = self.body
        return self._json({})

    def _commit(self, repo: Repo, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        pull_request = "create_pr=1" in self.query
        branch = f"refs/pr/{sum('/pr/' in name for name in repo.branches) + 1}" if pull_request else revision
        if not pull_request and branch not in repo.branches:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        tree, message = dict(repo.files(revision)), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        oid = repo.commit(branch, tree, message)
        url = f"{self.hub.endpoint}/{repo.repo_id}"
        return self._json(
            {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/1"}
        )

    def _info(self, repo: Repo, revision: str) -> None:
        oid = repo.resolve(revision or "main")
        if oid is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        return self._json({"id": repo.repo_id, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        oid = repo.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        found = {path: data for path, data in repo.commits[oid].items() if path.startswith(prefix)}
        if prefix and not found:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._json([{"type": "file", "path": p, "size": len(d), "oid": _etag(d)} for p, d in found.items()])

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        oid = repo.resolve(revision)
        if oid is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        data = repo.commits[oid].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", oid)
        return self._send(200, data, {"X-Repo-Commit": oid, "ETag": f'"{_etag(data)}"'}, "application/octet-stream")

    def _json(self, value: object, status: int = 200, kind: str = "application/json") -> None:
        self._send(status, json.dumps(value).encode(), {}, kind)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(status, json.dumps({"error": message}).encode(), headers, "application/json")

    def _send(self, status: int, data: bytes, headers: dict[str, str], kind: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
