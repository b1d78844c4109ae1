"""Image files to a model's input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from lowra.errors import LowraError

SUFFIXES = (".png", ".jpg", ".jpeg")


def open_image(path: Path, *, header_only: bool = False) -> Image.Image:
    """An image file as RGB; grey images are repeated over the channels.

    header_only: look at the file's header and decode nothing, to find broken files early.
    Raises LowraError when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image if header_only else image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise LowraError(f"{path} is not a readable image ({error}); fetch it again.") from None


def pixel_values(paths: Sequence[Path], processor: Any) -> Tensor:
    """Images as an image processor of transformers prepares them: (n, 3, height, width) float32.

    All are kept in memory: at 224 x 224, 1000 images take 0.6 GB. Raises LowraError for a file that is no image.
    """
    batches = []
    with tqdm(total=len(paths), desc="images", unit="image", delay=5, leave=False) as bar:
        for start in range(0, len(paths), 256):
            images = [open_image(path) for path in paths[start : start + 256]]
            batches.append(processor(images=images, return_tensors="pt")["pixel_values"])
            bar.update(len(images))
    return torch.cat(batches)  # (n, 3, height, width)


def image_processor(base: Path, **changes: Any) -> Any:
    """The image processor of a base model's folder, with settings changed.

    Raises LowraError when the folder has none.
    """
    from transformers import AutoImageProcessor

    processor_settings(base)
    return AutoImageProcessor.from_pretrained(base, **changes)


def processor_settings(base: Path) -> dict[str, Any]:
    """What a base model's folder says of its image processor. Raises LowraError when it says nothing, or no JSON."""
    path = base / "preprocessor_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise LowraError(
            f"{base} has no preprocessor_config.json; copy the base model with its image processor."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise LowraError(f"{path} cannot be read ({error}); copy the base model with its image processor.") from None
