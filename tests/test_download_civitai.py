"""The downloader, against a server on this machine that answers as civitai does."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scripts_as_modules import load_script

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def script():
    return load_script("download_civitai")


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
    assert script.main(civitai.arguments) == 0  # another host, as its answers and their redirects may name
    assert {path: headers.get("Authorization") for path, headers in civitai.seen} == {
        "/api/v1/model-versions/7": None,
        "/download/7": None,
        "/storage": None,
    }
    for url in ("https://civitai.com/api/v1/model-versions/7", "https://images.civitai.com/7"):
        assert script.request(url).unredirected_hdrs == {"Authorization": "Bearer secret"}
        assert "Authorization" not in script.request(url).headers  # these follow redirects
    for url in ("http://civitai.com/7", "https://civitai.com.evil.org/7", "https://evilcivitai.com/7", "file:///7"):
        assert "Authorization" not in script.request(url).unredirected_hdrs


@pytest.mark.parametrize("version", ["../../../x", "7/../8", "", "7\n", "٧", None, 7.5])
def test_versions_are_digits(script, civitai, tmp_path, capsys, version):
    entries = [{"name": "smol", "model": 1, "version": version, "url": "https://civitai.com/models/1"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert script.main(civitai.arguments) == 1
    assert "expected a model version id, digits" in capsys.readouterr().err
    assert not civitai.seen


@pytest.mark.parametrize("text", ["", "{", '["x"]', "[{}]", "3"])
def test_lists_that_are_none(script, civitai, tmp_path, capsys, text):
    (tmp_path / "list.json").write_text(text)
    assert script.main(civitai.arguments) == 1
    assert "list.json" in capsys.readouterr().err


def test_large_files_are_not_taken(script, civitai, capsys):
    assert script.main([*civitai.arguments, "--max-mb", "0.01"]) == 1
    assert "at most 0.01 MB are taken" in capsys.readouterr().err
    assert [path for path, _ in civitai.seen] == ["/api/v1/model-versions/7"]


def test_more_than_was_stated_is_not_read(script, civitai, capsys):
    civitai.version["files"][1]["sizeKB"] = 1.0
    assert script.main(civitai.arguments) == 1
    assert "got 1025 bytes" in capsys.readouterr().err
    assert not list(civitai.target.parent.iterdir())


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://civitai.com/7"])
def test_addresses_that_are_not_https(script, civitai, capsys, url):
    civitai.version["files"][1]["downloadUrl"] = url
    assert script.main(civitai.arguments) == 1
    assert "an address that is not https" in capsys.readouterr().err


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
