"""Models on a Hub: a small server with the real one's routes, asked by huggingface_hub itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from planted_checkpoints import base_state, save, three

from lowra.checkpoints.reading import StoredState

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder`/OWNER/NAME as model repositories; `served` holds (path, bytes of the answer)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.served: list[tuple[str, int]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and (self.server.folder / parts[2] / parts[3]).is_dir():
            folder = self.server.folder / parts[2] / parts[3]
            files = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
            told = {"id": "/".join(parts[2:4]), "modelId": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files}
            rows = [
                {"type": "file", "path": f["rfilename"], "size": f["size"], "oid": f"{i:040x}"}
                for i, f in enumerate(files)
            ]
            self.send(200, json.dumps(rows if "tree" in parts else told).encode(), {}, body)
        elif len(parts) == 5 and parts[2] == "resolve" and (path := self.file(parts)).is_file():
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
            wanted = self.headers.get("Range")
            if wanted is None:
                self.send(200, data, headers, body)
            else:
                start, stop = wanted.removeprefix("bytes=").split("-")
                piece = data[int(start) : int(stop) + 1 if stop else None]
                headers["Content-Range"] = f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}"
                self.send(206, piece, headers, body)
        else:
            missing = "EntryNotFound" if len(parts) == 5 and self.file(parts).parent.is_dir() else "RepoNotFound"
            self.send(404, b"{}", {"X-Error-Code": missing, "X-Repo-Commit": COMMIT}, body)

    def file(self, parts: list[str]) -> Path:
        return self.server.folder / parts[0] / parts[1] / parts[4]

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.server.served.append((self.path, len(data) if body else 0))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def recover(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lowra.recover", *arguments]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def weights(hub: Hub) -> int:
    """Bytes of weights that were served."""
    return sum(size for path, size in hub.served if ".safetensors" in path and "index" not in path)


def test_models_of_the_hub_are_fetched_and_recovered(hub: Hub, tmp_path: Path) -> None:
    three(hub.folder / "org")
    models = "models=[org/m0,org/m1,org/m2]"
    done = recover(hub, tmp_path, models, f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "Fetching org/m1" in done.stderr
    found, base = StoredState(tmp_path / "out"), base_state()
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in base.items())
    hub.served.clear()
    done = recover(hub, tmp_path, models, "output=null")  # what is there is not asked for again
    assert done.returncode == 0, done.stderr
    assert not hub.served


def test_what_does_not_fit_is_known_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    three(hub.folder / "org")
    save(hub.folder / "org" / "other", {f"blocks.{i}.weight": torch.randn(400, 400) for i in range(4)})
    done = recover(hub, tmp_path, "models=[org/m0,org/m1,org/other]", f"output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "org/other is of another architecture than org/m0" in done.stderr
    size = (hub.folder / "org" / "other" / "model.safetensors").stat().st_size
    assert weights(hub) < size / 2  # headers
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_repository_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    three(hub.folder / "org")
    done = recover(hub, tmp_path, "models=[org/m0,org/m1,org/nobody]", f"output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "'org/nobody' is no local folder or file, and as a Hub id it cannot be had" in done.stderr
    assert "Traceback" not in done.stderr
