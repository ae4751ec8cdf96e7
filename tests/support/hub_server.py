"""A small Hub of our own for tests: some twenty routes that huggingface_hub speaks, in memory, with faults to order.

It knows nothing of adapterhub. Large files go the way that `mode` says: "regular" (in the commit, as a client with Xet
on can take) or "lfs" (by the LFS batch API, for a client with HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = 10_000
"""Bytes from which on a file goes by LFS, in that mode."""


@dataclass
class Repo:
    private: bool = False
    commits: list = field(default_factory=list)
    """(id, {path: bytes}, paths by LFS), oldest first."""
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def at(self, revision):
        wanted = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit[0] == wanted), None)

    def commit(self, files, lfs, branch="main"):
        parent = self.branches.get(branch, "")
        told = (
            parent.encode()
            + b"".join(p.encode() + b"\0" + d for p, d in sorted(files.items()))
            + bytes([len(self.commits)])
        )
        self.commits.append((hashlib.sha1(told).hexdigest(), files, lfs))
        self.branches[branch] = self.commits[-1][0]
        return self.commits[-1][0]


class Hub:
    """The state, and what shall go wrong."""

    def __init__(self, mode="regular", tokens=("hf_writer",)):
        self.mode, self.tokens = mode, set(tokens)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.flip: dict[str, int] = {}
        """path -> how many downloads of it have a byte flipped."""
        self.cut: dict[str, int] = {}
        """path -> how many downloads of it end in the middle."""
        self.busy = 0
        """How many requests get 503."""
        self.refuse: set[str] = set()
        """Routes ("tag", "commit") that answer 500."""
        self.seen: Counter = Counter()

    def put(self, name, files, tag=None):
        """A repo as somebody else made it."""
        repo = self.repos.setdefault(name, Repo())
        commit = repo.commit(dict(files), set())
        if tag:
            repo.tags[tag] = commit
        return commit


def _entry(path, data, lfs):
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path in lfs:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    # --- answers -----------------------------------------------------------------------------------------------

    def answer(self, status, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer(404, {"error": code}, {"x-error-code": code, "x-error-message": code})

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def writer(self):
        shown = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if shown in self.hub.tokens:
            return True
        self.answer(403 if shown else 401, {"error": "a token that may write is needed"})
        return False

    def repo(self, name):
        repo = self.hub.repos.get(name)
        shown = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.private and shown not in self.hub.tokens):
            self.missing("RepoNotFound")
            return None
        return repo

    def commit_at(self, repo, revision):
        if (repo.commits or revision not in ("main", None)) and repo.at(revision or "main") is None:
            self.missing("RevisionNotFound")
            return None
        return repo.at(revision or "main") or ("", {}, set())

    # --- requests ----------------------------------------------------------------------------------------------

    def route(self):
        url = urllib.parse.urlsplit(self.path)
        path, hub = urllib.parse.unquote(url.path), self.hub
        self.query = urllib.parse.parse_qs(url.query)
        if hub.busy:
            hub.busy -= 1
            self.body()
            return self.answer(503, {"error": "busy"}, {"retry-after": "0"})
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in method and found:
                hub.seen[function.__name__] += 1
                return function(self, **found.groupdict())
        self.body()
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def whoami(self):
        if self.writer():
            self.answer(200, {"name": "writer", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create(self):
        wanted = json.loads(self.body())
        if not self.writer():
            return
        name = f"{wanted.get('organization') or 'writer'}/{wanted['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.origin}/{name}"})
        self.hub.repos[name] = Repo(private=bool(wanted.get("private")))
        self.answer(200, {"url": f"{self.origin}/{name}", "name": name})

    def delete(self):
        wanted = json.loads(self.body())
        if self.writer():
            self.hub.repos.pop(f"{wanted.get('organization') or 'writer'}/{wanted['name']}", None)
            self.answer(200, {})

    def move(self):
        wanted = json.loads(self.body())
        if self.writer():
            self.hub.repos[wanted["toRepo"]] = self.hub.repos.pop(wanted["fromRepo"])
            self.answer(200, {})

    def validate_yaml(self):
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        asked = json.loads(self.body())["files"]
        if self.writer() and self.repo(name) is not None:
            large = self.hub.mode == "lfs"
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if large and f["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            self.answer(200, {"files": files})

    def lfs_batch(self, name):
        asked = json.loads(self.body())
        if not self.writer():
            return
        objects = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                entry["actions"] = {
                    "upload": {"href": f"{self.origin}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.origin}/lfs-verify"},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "another hash"})
        self.hub.stored[oid] = data
        self.answer(200, {})

    def lfs_verify(self):
        self.answer(200 if json.loads(self.body())["oid"] in self.hub.stored else 404, {})

    def commit(self, name, revision):
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        repo = self.repo(name) if self.writer() else None
        if repo is None:
            return
        if "commit" in self.hub.refuse:
            return self.answer(500, {"error": "ordered"})
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") and header["parentCommit"] != repo.branches.get(revision):
            return self.answer(412, {"error": "A commit has happened since"})
        _, files, lfs = repo.at(revision) or ("", {}, set())
        files, lfs = dict(files), set(lfs)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                lfs.discard(value["path"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
                lfs.add(value["path"])
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                files = {p: d for p, d in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        oid = repo.commit(files, lfs, revision)
        url = f"{self.origin}/{name}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def refs(self, name):
        if (repo := self.repo(name)) is not None:
            told = {
                kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in found.items()]
                for kind, ref, found in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
            }
            self.answer(200, {**told, "converts": []})

    def tag(self, name, revision):
        wanted = json.loads(self.body() or b"{}")
        repo = self.repo(name) if self.writer() else None
        if repo is None:
            return
        if "tag" in self.hub.refuse:
            return self.answer(500, {"error": "ordered"})
        if self.command == "DELETE":
            repo.tags.pop(revision, None)
            return self.answer(200, {})
        if wanted["tag"] in repo.tags:
            return self.answer(409, {"error": "Tag reference exists already"})
        found = self.commit_at(repo, revision)
        if found is not None:
            repo.tags[wanted["tag"]] = found[0]
            self.answer(200, {})

    def branch(self, name, revision):
        wanted = json.loads(self.body() or b"{}")
        repo = self.repo(name) if self.writer() else None
        if repo is None:
            return
        if self.command == "DELETE":
            repo.branches.pop(revision, None)
        else:
            repo.branches[revision] = wanted.get("startingPoint") or repo.branches["main"]
        self.answer(200, {})

    def commits(self, name, revision):
        if (repo := self.repo(name)) is not None and self.commit_at(repo, revision):
            told = [
                {"id": c, "title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for c, _, _ in repo.commits
            ]
            self.answer(200, told[::-1])

    def search(self):
        words = self.query.get("search", [""])[0]
        self.answer(200, [self.about(name, repo, None) for name, repo in self.hub.repos.items() if words in name])

    def about(self, name, repo, found):
        oid, files, _ = found or repo.at("main") or ("", {}, set())
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "_id": name,
            "id": name,
            "modelId": name,
            "sha": oid or None,
            "private": repo.private,
            "siblings": siblings,
            "tags": [],
        }

    def info(self, name, revision=None):
        if (repo := self.repo(name)) is not None and (found := self.commit_at(repo, revision)) is not None:
            self.answer(200, self.about(name, repo, found))

    def tree(self, name, revision):
        if (repo := self.repo(name)) is not None and (found := self.commit_at(repo, revision)) is not None:
            self.answer(200, [_entry(path, data, found[2]) for path, data in sorted(found[1].items())])

    def paths_info(self, name, revision):
        asked = (
            urllib.parse.parse_qs(self.body().decode()) if "form" in (self.headers.get("content-type") or "") else None
        )
        if (repo := self.repo(name)) is not None and (found := self.commit_at(repo, revision)) is not None:
            paths = (asked or {}).get("paths", [])
            self.answer(200, [_entry(p, found[1][p], found[2]) for p in paths if p in found[1]])

    def resolve(self, name, revision, path):
        if (repo := self.repo(name)) is None or (found := self.commit_at(repo, revision)) is None:
            return
        if path not in found[1]:
            return self.missing("EntryNotFound")
        data, lfs = found[1][path], path in found[2]
        entry = _entry(path, data, found[2])
        etag = f'"{entry["lfs"]["oid"] if lfs else entry["oid"]}"'
        headers = {
            "etag": etag,
            "x-repo-commit": found[0],
            "accept-ranges": "bytes",
            "content-type": "application/octet-stream",
        }
        headers |= {"x-linked-etag": etag, "x-linked-size": str(len(data))} if lfs else {}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(key, value)
            return self.end_headers()
        begin, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or ""):
            begin, status = int(wanted[1]), 206
            headers["content-range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        sent = bytearray(data[begin:])
        if self.hub.flip.get(path, 0) > 0 and sent:
            self.hub.flip[path] -= 1
            sent[len(sent) // 2] ^= 1
        if self.hub.cut.get(path, 0) > 0:
            self.hub.cut[path] -= 1
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(sent))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(sent[: len(sent) // 2])
            self.close_connection = True
            return None
        self.answer(status, bytes(sent), headers)
        return None


_NAME, _REV = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("DELETE",), "/api/repos/delete", Handler.delete),
    (("POST",), "/api/repos/move", Handler.move),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"/api/models/{_NAME}/preupload/{_REV}", Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("POST",), "/lfs-verify", Handler.lfs_verify),
    (("POST",), rf"/api/models/{_NAME}/commit/{_REV}", Handler.commit),
    (("GET",), rf"/api/models/{_NAME}/refs", Handler.refs),
    (("POST", "DELETE"), rf"/api/models/{_NAME}/tag/{_REV}", Handler.tag),
    (("POST", "DELETE"), rf"/api/models/{_NAME}/branch/{_REV}", Handler.branch),
    (("GET",), rf"/api/models/{_NAME}/commits/{_REV}", Handler.commits),
    (("GET",), "/api/models", Handler.search),
    (("GET",), rf"/api/models/{_NAME}/revision/{_REV}", Handler.info),
    (("GET",), rf"/api/models/{_NAME}", Handler.info),
    (("GET",), rf"/api/models/{_NAME}/tree/{_REV}", Handler.tree),
    (("POST",), rf"/api/models/{_NAME}/paths-info/{_REV}", Handler.paths_info),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/{_REV}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running(hub):
    """The Hub at an address on loopback, in a thread of this process."""
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.origin = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield handler.origin
    finally:
        server.shutdown()
        server.server_close()
