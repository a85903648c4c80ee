"""A Hugging Face hub of one repository on this machine: the few answers that a download asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, folder: Path) -> Path:
    """A copy of a repository in a hub's cache folder, as a download leaves it; its snapshot links to `folder`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(folder)
    return repository / "snapshots" / COMMIT


@contextmanager
def served(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Gives the hub's address and the list, growing, of the paths it was asked for."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            asked.append(path)
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for file, body in files.items()
                ]
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file} for file in files]
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"/{name}/resolve/{COMMIT}/"):
                body = files[path.removeprefix(f"/{name}/resolve/{COMMIT}/")]
                self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
