"""What the ViT miniature makes instead of downloading: a base model, and task folders as VTAB-1k's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lowra.builders.vit_pictures import PRETRAINING_CLASSES, TASKS, draw_images, draw_thing
from lowra.checks import Count, Positive, Share, Weight
from lowra.errors import LowraError


@dataclass(frozen=True)
class Miniature:
    """A small ViT and its drawn images.

    image_size, patch_size: pixels. width, depth, heads: of the transformer; its MLPs are 4 widths wide.
    initial_std: of the untrained weights.
    train, val: images of a task. pretraining_images: drawn for the base; held_out: more of them, to test it.
    epochs, batch_size, learning_rate, weight_decay, warmup (a share of the steps): of pre-training, with AdamW.
    evaluation_per_class: held-out images per class on which activations are compared.
    """

    image_size: Count
    patch_size: Count
    width: Count
    depth: Count
    heads: Count
    initial_std: Positive
    train: Count
    val: Count
    pretraining_images: Count
    held_out: Count
    epochs: Count
    batch_size: Count
    learning_rate: Positive
    weight_decay: Weight
    warmup: Share
    evaluation_per_class: Count

    def check(self) -> None:
        """Raise LowraError for sizes that do not go together."""
        if self.width % self.heads or self.image_size % self.patch_size:
            raise LowraError(
                f"builder.miniature: width={self.width} must be a multiple of heads={self.heads}, and "
                f"image_size={self.image_size} of patch_size={self.patch_size}."
            )

    def new_model(self) -> Any:
        """An untrained model: the architecture class of the full-size one."""
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            image_size=self.image_size,
            patch_size=self.patch_size,
            initializer_range=self.initial_std,
            num_labels=PRETRAINING_CLASSES,  # type: ignore[call-arg]
        )
        return ViTForImageClassification(config)

    def processor(self) -> Any:
        """The image processor that is saved with the base; mean and std 0.5, as the full-size base's."""
        from transformers import ViTImageProcessor

        return ViTImageProcessor(size={"height": self.image_size, "width": self.image_size})

    def pretraining_data(self, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Drawn images to pre-train on and to test with, as the model takes them."""
        # The sequences [seed, 100...] are apart from those of tasks and of evaluation images.
        rng = np.random.default_rng([seed, 100])
        total = self.pretraining_images + self.held_out
        images, labels = draw_images(draw_thing, PRETRAINING_CLASSES, total, self.image_size, rng)
        pixels = self.processor()(images=list(images), return_tensors="pt")["pixel_values"]
        everything = {"pixel_values": pixels, "labels": torch.from_numpy(labels)}
        cut = self.pretraining_images
        return {k: v[:cut] for k, v in everything.items()}, {k: v[cut:] for k, v in everything.items()}

    def write_task(self, folder: Path, task: str, seed: int) -> None:
        """Draw one task in the layout in which the community distributes VTAB-1k.

        `images/*.png`, and `train800.txt`, `val200.txt` (so named for other numbers of images too) with a line
        "images/<name>.png <label>" per image.
        """
        classes, draw = TASKS[task]
        # Seeded by the task's own place, so that a task's images do not depend on which others are drawn.
        rng = np.random.default_rng([seed, list(TASKS).index(task)])
        images, labels = draw_images(draw, classes, self.train + self.val, self.image_size, rng)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        lines = []
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"images/{i:06}.png"
            Image.fromarray(image).save(folder / name, compress_level=1)
            lines.append(f"{name} {label}\n")
        (folder / "train800.txt").write_text("".join(lines[: self.train]))
        (folder / "val200.txt").write_text("".join(lines[self.train :]))

    def write_evaluation(self, folder: Path, seed: int) -> None:
        """Draw held-out images of the pre-training kinds in ImageNet's layout: a folder per class."""
        rng = np.random.default_rng([seed, 101])
        for label in range(PRETRAINING_CLASSES):
            inside = folder / f"class_{label:02}"
            inside.mkdir(exist_ok=True)
            for i in range(self.evaluation_per_class):
                image = draw_thing(label, rng).resize((self.image_size, self.image_size), Image.Resampling.BOX)
                image.save(inside / f"{i:02}.png")
