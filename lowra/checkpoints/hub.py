"""Models on the Hub: what they hold from their headers, and the download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowra.checkpoints.reading import DTYPES, Checkpoint, StoredState, TensorInfo, refuse_quantised
from lowra.errors import LowraError

T = TypeVar("T")

# Configurations, tokenizers, code that is only copied, and weights; PyTorch's own files only where nothing else is.
PATTERNS = ["*.json", "*.txt", "*.model", "*.py", "*.safetensors"]
UNWANTED = ["*.onnx", "*.gguf", "*.msgpack", "*.h5", "*.ot", "onnx/*", "openvino/*", "original/*", "checkpoint-*/*"]


class RemoteState(StoredState):
    """The headers of a repository's safetensors files; its tensors cannot be read before it is fetched."""

    def __init__(self, repository: str, metadata: Any) -> None:
        self.place = Path(repository)
        self.files = [Path(name) for name in metadata.files_metadata]
        self.metadata = {Path(name): dict(file.metadata) for name, file in metadata.files_metadata.items()}
        self._pickled = {}
        self.infos = {}
        for name, file in metadata.files_metadata.items():
            for tensor, info in file.tensors.items():
                dtype = DTYPES.get(info.dtype, torch.uint8)
                self.infos[tensor] = TensorInfo(tensor, dtype, tuple(info.shape), Path(name), info.data_offsets[0])


def headers(repository: str) -> Checkpoint:
    """A Hub model by its headers alone: a few kilobytes whatever its size.

    A repository whose weights are in folders, or not in safetensors, is known only once it is fetched.
    """
    if repository.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise LowraError(f"There is no model at {repository}.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = _asked(repository, lambda: HfApi().get_safetensors_metadata(repository))
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        return _fetched(repository)
    checkpoint = Checkpoint(repository, Path(repository), {"": RemoteState(repository, metadata)})
    refuse_quantised(checkpoint)
    return checkpoint


def _fetched(repository: str) -> Checkpoint:
    from lowra.checkpoints.reading import open_checkpoint

    return open_checkpoint(fetch(repository), label=repository)


def cached(repository: str) -> Path | None:
    """The folder of a Hub model that was downloaded before, None where it was not. Asks nobody."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except Exception:  # not there, or no possible id: `headers` says which
        return None
    return folder if any(folder.rglob("*.safetensors")) or any(folder.rglob("*.bin")) else None


def fetch(repository: str) -> Path:
    """The local folder of a Hub model, downloaded where it is not cached. Raises LowraError when it cannot be had."""
    from huggingface_hub import snapshot_download

    def get(patterns: list[str]) -> Path:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=UNWANTED))

    folder = _asked(repository, lambda: get(PATTERNS))
    if not any(folder.rglob("*.safetensors")):
        folder = _asked(repository, lambda: get([*PATTERNS, "*.bin"]))
    return folder


def _asked(repository: str, ask: Callable[[], T]) -> T:
    """The Hub's answer, its refusals as a sentence."""
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        return ask()
    except (NotASafetensorsRepoError, SafetensorsParsingError):
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(
            f"{repository!r} is no local folder or file, and as a Hub id it cannot be had ({first}); name a folder, or "
            "fetch the model first."
        ) from None
