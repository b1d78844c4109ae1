"""The downloader, against a server on this machine that answers as civitai does."""

import hashlib
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_civitai.py"
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("download_civitai", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def civitai(tmp_path):
    """A server with one model version; `seen` lists its requests and `behaviour` can be changed by a test."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.seen.append((self.path, dict(self.headers)))
            if server.fail:
                self.send_error(server.fail.pop(0))
            elif self.path == "/api/v1/model-versions/7":
                self.answer(json.dumps(server.version).encode())
            elif self.path == "/download/7":  # civitai redirects to a storage host
                self.send_response(307)
                self.send_header("Location", f"http://localhost:{server.server_port}/storage")
                self.end_headers()
            else:
                asked = self.headers.get("Range")
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                self.answer(CONTENT[start:], 206 if asked else 200, server.cut)

        def answer(self, body, status=200, cut=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.fail, server.cut = [], [], None
    address = f"http://127.0.0.1:{server.server_port}"
    server.version = {
        "files": [
            {"name": "pictures.zip", "type": "Training Data", "sizeKB": 1.0, "hashes": {"SHA256": "00"}},
            {
                "name": "Smol.safetensors",
                "type": "Model",
                "primary": True,
                "sizeKB": len(CONTENT) / 1024,
                "hashes": {"SHA256": hashlib.sha256(CONTENT).hexdigest().upper()},
                "downloadUrl": f"{address}/download/7",
            },
        ]
    }
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps([{"name": "smol", "model": 1, "version": 7, "url": "https://civitai.com/models/1"}]))
    server.arguments = [str(tmp_path / "loras"), "--list", str(listing), "--api", f"{address}/api/v1", "--pause", "0"]
    server.target = tmp_path / "loras" / "7.safetensors"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_downloads_and_skips_what_is_there(script, civitai, capsys):
    assert script.main(civitai.arguments) == 0
    assert civitai.target.read_bytes() == CONTENT
    assert script.main(civitai.arguments) == 0
    assert "there already" in capsys.readouterr().out
    assert [path for path, _ in civitai.seen].count("/storage") == 1


def test_resumes_where_it_stopped(script, civitai):
    civitai.target.parent.mkdir()
    civitai.target.with_suffix(".partial").write_bytes(CONTENT[:1000])
    assert script.main(civitai.arguments) == 0
    assert civitai.target.read_bytes() == CONTENT
    assert civitai.seen[-1][1]["Range"] == "bytes=1000-"


def test_goes_on_after_a_cut_connection_and_server_errors(script, civitai):
    civitai.fail, civitai.cut = [503, 503], 6000
    assert script.main(civitai.arguments) == 0
    assert civitai.target.read_bytes() == CONTENT
    assert any("Range" in headers for _, headers in civitai.seen)


def test_wrong_content_is_thrown_away(script, civitai, capsys):
    civitai.version["files"][1]["hashes"]["SHA256"] = "ab" * 32
    assert script.main(civitai.arguments) == 1
    assert "civitai states" in capsys.readouterr().err
    assert not list(civitai.target.parent.iterdir())


def test_token_goes_to_civitai_alone(script, civitai, monkeypatch):
    monkeypatch.setenv("CIVITAI_TOKEN", "secret")
    assert script.main(civitai.arguments) == 0
    sent = {path: headers.get("Authorization") for path, headers in civitai.seen}
    assert sent == {"/api/v1/model-versions/7": "Bearer secret", "/download/7": "Bearer secret", "/storage": None}


def test_refusal_names_the_token_and_the_page(script, civitai, capsys):
    civitai.fail = [401]
    assert script.main(civitai.arguments) == 1
    error = capsys.readouterr().err
    assert "CIVITAI_TOKEN" in error
    assert "https://civitai.com/models/1" in error


def test_table_8_is_complete(script):
    entries = json.loads(script.TABLE_8.read_text())
    assert len(entries) == len({entry["version"] for entry in entries}) == 15
    assert all(f"{e['model']}/" in e["url"] and e["url"].endswith(f"={e['version']}") for e in entries)
