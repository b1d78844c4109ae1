#!/usr/bin/env python3
"""Download the fifteen LoRAs of Table 8 from civitai, as <model version id>.safetensors.

    python scripts/download_civitai.py FOLDER

Interrupted downloads go on where they stopped, finished files are checked (size and SHA256 as civitai states them) and
not fetched again. Some files need an account: put an API key of yours into the environment variable CIVITAI_TOKEN; it
is sent to civitai.com alone, over https, never along a redirect, and never written anywhere. Needs nothing but the
standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

TABLE_8 = Path(__file__).resolve().parent.parent / "lowra" / "builders" / "civitai.json"
USER_AGENT = "lowra-bench (https://arxiv.org/abs/2402.10208 reproduction)"
CHUNK = 1 << 20
TOKEN_HOST = "civitai.com"


class DownloadError(Exception):
    """One file could not be had; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Download every listed file. Returns 0, or 1 when some could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--list", type=Path, default=TABLE_8, help="JSON list of files (default: Table 8)")
    parser.add_argument("--api", default="https://civitai.com/api/v1", help="address of civitai's API")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between requests (default: %(default)s)")
    parser.add_argument("--max-mb", type=float, default=1000, help="largest file to take (default: %(default)s MB)")
    parser.add_argument("--tries", type=int, default=5, help="attempts per request (default: %(default)s)")
    options = parser.parse_args(arguments)

    try:
        entries = read_list(options.list)
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for entry in entries:
        target = options.folder / f"{entry['version']}.safetensors"
        limit = int(options.max_mb * 1e6)
        try:
            fetch(entry, target, options.api, limit=limit, pause=options.pause, tries=options.tries)
        except DownloadError as error:
            failed.append(entry)
            print(f"{entry['name']}: {error}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} files are missing. Run this again, set CIVITAI_TOKEN, or save them by hand from "
            f"{', '.join(entry['url'] for entry in failed)} as {options.folder}/<modelVersionId>.safetensors.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def read_list(path: Path) -> list[dict[str, Any]]:
    """The files of a list: name, page and model version id, which is digits and nothing else: it names the file.

    Raises DownloadError.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            if not re.fullmatch(r"[0-9]{1,18}", str(entry["version"])):
                raise DownloadError(f"{path} has version {entry['version']!r}; expected a model version id, digits.")
            if not (isinstance(entry["name"], str) and isinstance(entry["url"], str)):
                raise TypeError
    except (OSError, ValueError) as error:
        raise DownloadError(f"{path} is not a readable JSON list of files ({error})") from None
    except (TypeError, KeyError):
        raise DownloadError(f"{path} does not list files as objects with name, version and url") from None
    return entries


def fetch(entry: dict[str, Any], target: Path, api: str, *, limit: int, pause: float, tries: int) -> None:
    """Download and check one file of at most `limit` bytes. Raises DownloadError."""
    file = describe(f"{api}/model-versions/{entry['version']}", pause=pause, tries=tries)
    size, digest = round(file["sizeKB"] * 1024), file["hashes"]["SHA256"].lower()
    if not 0 < size <= limit:
        raise DownloadError(f"civitai states {size / 1e6:.1f} MB; at most {limit / 1e6:g} MB are taken (--max-mb)")
    scheme = urllib.parse.urlsplit(file["downloadUrl"]).scheme
    if scheme not in ("https", urllib.parse.urlsplit(api).scheme):
        raise DownloadError(f"civitai gives an address that is not https: {file['downloadUrl'][:80]!r}")
    if target.exists() and target.stat().st_size == size and sha256(target) == digest:
        print(f"{entry['name']}: {target} is there already")
        return
    partial = target.with_suffix(".partial")
    for attempt in range(tries):
        try:
            download(file["downloadUrl"], partial, entry["name"], size)
        except (OSError, HTTPException) as error:
            give_up(error, attempt, tries)
            time.sleep(pause * 2**attempt)
            continue
        if partial.exists() and partial.stat().st_size >= size:
            break
        time.sleep(pause)  # the connection ended early: go on from there
    found = partial.stat().st_size if partial.exists() else 0
    if found < size:
        raise DownloadError(f"{found} of {size} bytes came; run again to go on from there")
    actual = sha256(partial)
    if found != size or actual != digest:
        partial.unlink()
        raise DownloadError(f"got {found} bytes with SHA256 {actual}, civitai states {size} bytes and {digest}")
    os.replace(partial, target)
    time.sleep(pause)


def describe(url: str, *, pause: float, tries: int) -> dict[str, Any]:
    """What the API says of a version's safetensors file: sizeKB, hashes, downloadUrl."""
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request(url), timeout=60) as answer:
                files = json.load(answer)["files"]
            break
        except (OSError, HTTPException, ValueError, KeyError) as error:
            give_up(error, attempt, tries)
            time.sleep(pause * 2**attempt)
    models = [
        file
        for file in files
        if file.get("type") == "Model" and file["name"].endswith(".safetensors") and "SHA256" in file.get("hashes", {})
    ]
    models.sort(key=lambda file: not file.get("primary", False))
    if not models:
        raise DownloadError(f"{url} lists no safetensors file with a SHA256")
    return models[0]


def give_up(error: Exception, attempt: int, tries: int) -> None:
    """Raise DownloadError when trying again is no use: refused, not there, or the last attempt."""
    code = error.code if isinstance(error, urllib.error.HTTPError) else None
    if code in (401, 403):
        raise DownloadError(f"civitai refuses ({code}); set CIVITAI_TOKEN to an API key of your account") from None
    if code in (400, 404, 410) or attempt == tries - 1:
        raise DownloadError(str(error)) from None


def download(url: str, partial: Path, name: str, size: int) -> None:
    """Append what is missing of a file of `size` bytes to `partial`, and no more than a byte too many."""
    have = partial.stat().st_size if partial.exists() else 0
    asked = request(url)
    if have:
        asked.add_header("Range", f"bytes={have}-")
    try:
        answer: HTTPResponse = urllib.request.urlopen(asked, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing, or the file has changed: the checks decide
            return
        raise
    with answer, partial.open("ab" if answer.status == 206 else "wb") as out:
        done = out.tell()
        total = done + int(answer.headers.get("Content-Length", 0))
        while done <= size and (chunk := answer.read(min(CHUNK, size + 1 - done))):
            out.write(chunk)
            done += len(chunk)
            print(f"\r{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", end="", file=sys.stderr)
    print(file=sys.stderr)


def request(url: str) -> urllib.request.Request:
    """A request as ourselves; to civitai, and over https, with the token if there is one."""
    made = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    where = urllib.parse.urlsplit(url)
    host = (where.hostname or "").lower()
    ours = where.scheme == "https" and (host == TOKEN_HOST or host.endswith(f".{TOKEN_HOST}"))
    if ours and (token := os.environ.get("CIVITAI_TOKEN")):
        # Unredirected: downloads are redirected to other hosts' storage, which must not see the token.
        made.add_unredirected_header("Authorization", f"Bearer {token}")
    return made


def sha256(path: Path) -> str:
    """The file's SHA256, lower case."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
