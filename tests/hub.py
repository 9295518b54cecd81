"""A hub on the loopback address, of models that are folders: what huggingface_hub asks one for, no more."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """`folders` by the models' names; those of other names are not there, and `private` want a token."""

    def __init__(self, folders, private=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        self.private, self.uploaded, self.asked = set(private), {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(hub):
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            if path.split("/")[5:6] not in ([], ["main"], [COMMIT]):
                self.answer({"error": "Revision not found"}, 404, **{"X-Error-Code": "RevisionNotFound"})
            elif folder := self.folder(name):
                files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
                if "/tree/" in path:
                    self.answer([self.entry(folder, file) for file in files])
                else:
                    siblings = [{"rfilename": file} for file in files]
                    self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        else:
            parts = path.split("/")
            folder = self.folder("/".join(parts[:2]))
            if folder and (found := folder / "/".join(parts[4:])).is_file():
                data = found.read_bytes()
                self.answer(data, ETag=f'"{_digest(data)}"', **{"X-Repo-Commit": COMMIT})
            elif folder:
                self.answer({}, 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        data = self.body()
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "api/repos/create":
            about = json.loads(data)
            name = f"{about.get('organization') or 'me'}/{about['name']}"
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(data)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        else:
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.server.uploaded[file["path"]] = base64.b64decode(file["content"])
            name = "/".join(path.split("/")[2:4])
            about = {"commitOid": COMMIT, "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}"}
            self.answer({"success": True} | about)

    def body(self):
        if self.headers["Content-Length"]:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []  # Transfer-Encoding: chunked
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def folder(self, name):
        """None after an answer that says what is wrong."""
        if name in self.server.private and self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "gated"}, 401, **{"X-Error-Code": "GatedRepo"})
        elif name in self.server.folders:
            return self.server.folders[name]
        else:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        return None

    def entry(self, folder, file):
        data = (folder / file).read_bytes()
        return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(data):
    return hashlib.sha1(data).hexdigest()
