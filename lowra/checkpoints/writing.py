"""Checkpoints written a tensor at a time, in any order, by any number of processes, resumed where a kill left them.

All names, shapes and dtypes of what is written are known before the first byte, so a shard's header goes first and
every tensor has its place from then on. Nothing is held back in memory. Shards grow in a folder `NAME.partial`, which
takes its final name once they are complete; a journal in it says which tensors are, with a checksum of their bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from lowra.checkpoints.reading import NAMES, StoredState
from lowra.errors import LowraError
from lowra.files import system_error

JOURNAL = ".journal.jsonl"

# Bytes handled at a time.
PIECE = 2**24


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: bytes [offset, offset + nbytes) of a file that has its full size from the start."""

    path: Path
    dtype: torch.dtype
    offset: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.dtype.itemsize

    def write(self, values: Tensor, start: int = 0) -> None:
        """Put flat values of the slot's dtype at entry `start`. Raises LowraError when the disk is full."""
        values = values.detach().cpu().contiguous().view(-1)
        if values.dtype != self.dtype or start + values.numel() > self.numel:
            raise ValueError(f"{values.numel()} {values.dtype} from {start} do not fit {self.numel} {self.dtype}")
        if not values.numel():
            return
        view = memoryview(values.view(torch.uint8).numpy().data)
        with SpaceTold(self.path), open(self.path, "r+b", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            done = 0
            while done < len(view):
                done += file.write(view[done:])

    def checksum(self) -> int:
        """CRC-32 of the bytes as they stand in the file."""
        total, left = 0, self.nbytes
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    return -1
                total, left = zlib.crc32(piece, total), left - len(piece)
        return total


class SpaceTold:
    """Turn a full disk into a sentence; everything finished so far stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and system_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LowraError(
                f"The disk is full ({self.path.parent}). What is finished is kept: make room and give the same command "
                "again."
            ) from None


@dataclass(frozen=True)
class Entry:
    """A tensor to be written, of one shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Shard:
    """A safetensors file before its tensors: the header, the size of the whole, and every tensor's slot."""

    path: Path
    head: bytes
    size: int
    slots: dict[str, Slot]

    @classmethod
    def planned(cls, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Shard:
        """The file that will hold some tensors."""
        # Wide numbers first, so that each begins at a multiple of its size, as the format asks for.
        ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        places, end = {}, 0
        for entry in ordered:
            begin, end = end, end + entry.numel * entry.dtype.itemsize
            header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
            places[entry.name] = (entry, begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        slots = {name: Slot(path, entry.dtype, start + begin, entry.numel) for name, (entry, begin) in places.items()}
        return cls(path, len(text).to_bytes(8, "little") + text, start + end, slots)

    @property
    def stands(self) -> bool:
        """Whether the file is there, of its size and with its header; of the tensors this says nothing."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self.head)) == self.head

    def create(self) -> dict[str, Slot]:
        """Make the file, unless a killed run left it; returns the slots. Raises LowraError when it has no room."""
        if not self.stands:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with SpaceTold(self.path), open(self.path, "wb") as file:
                if hasattr(os, "posix_fallocate") and self.size > len(self.head):
                    os.posix_fallocate(file.fileno(), 0, self.size)  # a full disk shows now, not hours later
                file.truncate(self.size)
                file.write(self.head)
        return self.slots


# ---- A folder in the making -------------------------------------------------------------------------------------


class Workshop:
    """A folder in the making: `OUT.partial`, its journal of finished pieces, and the renaming at the end.

    folder: the final name. key: identifies the command; a journal of another command is not continued. scratch: folders
    in it that are no part of the result. One process owns it at a time (its workers write tensors for it). Raises
    LowraError when OUT holds something else, when OUT.partial is another command's, or when another process works on it
    now.
    """

    def __init__(self, folder: Path, key: str, scratch: Sequence[str] = ()) -> None:
        self.folder, self.key, self.scratch = folder, key, tuple(scratch)
        self.partial = folder.with_name(folder.name + ".partial")
        self.records: dict[str, dict[str, Any]] = {}
        self.finished = self._is_finished()
        if self.finished:
            self._clean()
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LowraError(f"output={folder} is not empty; name a new folder, or empty this one.")
        if self.partial.is_dir() and any(self.partial.iterdir()) and not (self.partial / JOURNAL).exists():
            raise LowraError(
                f"{self.partial}, where the output is made, holds files of somebody else's; move it away, or name "
                "another output."
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._journal: TextIO = open(self.partial / JOURNAL, "a+", encoding="utf-8")  # noqa: SIM115 (held to the end)
        except OSError as error:
            raise LowraError(f"output={folder} cannot be written ({error.strerror}).") from None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LowraError(f"Another process is writing {folder} now; wait for it, or name another output.") from None
        self._read()

    def _is_finished(self) -> bool:
        try:
            return bool(json.loads((self.folder / "recovery.json").read_text())["key"] == self.key)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self) -> None:
        """Take up the journal: whole lines count, a torn last one is cut off."""
        path = self.partial / JOURNAL
        whole, length = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            whole.append(record)
            length += len(line)
        if whole and whole[0].get("key") != self.key:
            if len(whole) > 1:
                raise LowraError(
                    f"{self.partial} holds the unfinished work of another command ({whole[0].get('command', '?')}); "
                    "give that command again, or delete the folder."
                )
            whole, length = [], 0
        os.truncate(path, length)
        self._begun = bool(whole)
        self.records = {record["item"]: record for record in whole if "item" in record}

    def begin(self, command: str) -> None:
        """Write the journal's first line, once what the command needs has been checked."""
        if not self._begun:
            self._put({"key": self.key, "command": command})

    def done(self, item: str, record: Mapping[str, Any]) -> None:
        """Note that an item's bytes are all in their places."""
        self.records[item] = {"item": item, **record}
        self._put(self.records[item])

    def _put(self, record: Mapping[str, Any]) -> None:
        with SpaceTold(self.partial / JOURNAL):
            self._journal.write(json.dumps(record) + "\n")
            self._journal.flush()

    def forget(self, item: str) -> None:
        """Do an item again: its bytes are not what the journal says."""
        self.records.pop(item, None)

    def write_text(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, make: Callable[[Path], object]) -> None:
        """A file made under a temporary name, then renamed."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        with SpaceTold(path):
            make(temporary)
            os.replace(temporary, path)

    def finish(self) -> None:
        """Give the complete folder its name. What is no part of it is kept until then, for a run after a kill."""
        for path in sorted(self.partial.rglob(".*")):
            if path.is_file() and path.name != JOURNAL:
                path.unlink()  # a temporary of a killed run
        for path in self.partial.rglob("*.safetensors"):
            if path.is_file() and path.relative_to(self.partial).parts[0] not in self.scratch:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if self.folder.exists():
            self.folder.rmdir()
        os.replace(self.partial, self.folder)
        self._clean()
        self._journal.close()

    def _clean(self) -> None:
        """Take what is no part of the result out of the finished folder."""
        for name in self.scratch:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise LowraError when the disk that will hold `folder` has less than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LowraError(
            f"The output needs {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free; make room, or "
            "name another output."
        )


def output_name(path: Path) -> str:
    """The name a weight file's tensors are written under: PyTorch's files become safetensors."""
    if path.suffix == ".safetensors":
        return path.name
    return path.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)


def plan_shards(state: StoredState) -> dict[str, list[Entry]]:
    """File name to the tensors it will hold: a checkpoint's own shard map."""
    shards: dict[str, list[Entry]] = {output_name(path): [] for path in state.files}
    for info in state.infos.values():
        shards[output_name(info.path)].append(Entry(info.name, info.dtype, info.shape))
    return shards


def index_text(shards: Mapping[str, Sequence[Entry]]) -> str:
    """The index of a sharded checkpoint, as transformers and diffusers write it."""
    places = {entry.name: file for file, entries in shards.items() for entry in entries}
    size = sum(entry.numel * entry.dtype.itemsize for entries in shards.values() for entry in entries)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def index_name(file: Path) -> str:
    """The name of the index that belongs to a shard of this name, with its variant where it has one."""
    stem, _, _ = output_name(file).partition("-")
    stem, _, variant = stem.partition(".")
    return f"{stem}.safetensors.index{'.' + variant if variant else ''}.json"


def pieces(numel: int, dtype: torch.dtype, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Ranges of entries of about `size` bytes that cover a tensor; one empty range for an empty tensor."""
    step = max(1, size // dtype.itemsize)
    for start in range(0, max(numel, 1), step):
        yield start, min(start + step, numel)
