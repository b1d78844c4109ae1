"""Act.-Dist. (Section 6.4, Appendix E): how far apart the activations of two image models are.

For each image, the cosine distance between the true and the recovered model's mean token after the last transformer
block, averaged over images. "After the last block" is read literally: the residual stream before the final layer norm.
The mean is over all tokens, the class token included. Activations come from float32 models; distances are float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lowra.bench.images import SUFFIXES, image_processor, open_image, pixel_values, processor_settings
from lowra.checkpoints.reading import StoredState, component_folder, with_weights
from lowra.checks import Count, Name, OneOf, check_fields
from lowra.digests import file_digest
from lowra.errors import LowraError
from lowra.files import replacing
from lowra.imports import uncollected
from lowra.metrics.base import REFERENCE, Weights, digest
from lowra.packages import require
from lowra.quiet import quiet


@dataclass(frozen=True)
class ActivationDistance:
    """The Act.-Dist. column of Table 2; lower is closer, 0 for equal models.

    images: folder of ImageNet's validation images, a sub-folder per class; None takes the builder's held-out images.
    images_per_class: the first so many of each class, by file name (the paper: 5 of 1000 classes).
    tokens: "mean", or "flatten" to compare all tokens as one long vector, as the authors' script does.
    blocks: "last", or "all" for an extra column `act_dist_block_<i>` per transformer block, as the script prints.
    batch_size: images a forward pass. The preprocessed images stay in memory (3 GB at the paper's numbers).
    """

    images: Name | None
    images_per_class: Count
    tokens: Annotated[str, OneOf(("mean", "flatten"))]
    blocks: Annotated[str, OneOf(("last", "all"))]
    batch_size: Count

    column: ClassVar[str] = "act_dist"
    pretty: ClassVar[str] = "Act.-Dist."
    kinds: ClassVar[tuple[str, ...]] = ("image_classifier",)
    places: ClassVar[tuple[str, ...]] = ("images",)

    def ready(self) -> None:
        """Raise LowraError for settings that cannot be and missing packages."""
        check_fields(self, "metrics.activation_distance")
        require("Act.-Dist.", "transformers", "torchvision")

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        """Raise LowraError for a base without weights or processor, and missing or broken images."""
        # The images first: they are the cheapest to look at, and the base may have to be fetched.
        for path in self.image_paths(evaluation):
            open_image(path, header_only=True)
        if base:
            folder = component_folder(base)
            StoredState(folder)
            processor_settings(folder)  # not the processor: its libraries take seconds to import

    def inputs(self, evaluation: Path | None) -> str:
        """A digest of the images' names and bytes."""
        paths = self.image_paths(evaluation)
        return digest([(path.parent.name, path.name, file_digest(path)) for path in paths])

    def image_paths(self, evaluation: Path | None) -> list[Path]:
        """The images to compare on, class by class in the order of names.

        Raises LowraError when there is no folder, or a class has too few images.
        """
        folder = Path(self.images) if self.images is not None else evaluation
        if folder is None:
            raise LowraError(
                "Act.-Dist. needs images: give metrics.activation_distance.images=FOLDER, ImageNet's validation images "
                "in a sub-folder per class, or use metrics=[] or source=mini."
            )
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not classes:
            raise LowraError(f"Image folder {folder} has no sub-folders; expected one per class, with images in it.")
        chosen = []
        for inside in classes:
            found = sorted(path for path in inside.iterdir() if path.suffix.lower() in SUFFIXES)
            if len(found) < self.images_per_class:
                raise LowraError(
                    f"Class folder {inside} holds {len(found)} images; metrics.activation_distance.images_per_class "
                    f"asks for {self.images_per_class}."
                )
            chosen += found[: self.images_per_class]
        return chosen

    def scorer(
        self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path | None
    ) -> ActivationScorer:
        """The base model's activations on all images; `activation_distance_images.txt` in `artifacts` lists these."""
        paths = self.image_paths(evaluation)
        if artifacts is not None:
            with replacing(artifacts / "activation_distance_images.txt") as temporary:
                temporary.write_text("".join(f"{path.parent.name}/{path.name}\n" for path in paths))
        return ActivationScorer(self, component_folder(base), paths, device)

    def gallery(self, artifacts: Path, columns: Mapping[str, str], folder: Path, title: str) -> list[Path]:
        """Nothing: a classifier's activations are not for looking at."""
        return []


class ActivationScorer:
    """Act.-Dist. bound to one base model."""

    def __init__(self, metric: ActivationDistance, base: Path, paths: list[Path], device: torch.device) -> None:
        self._metric = metric
        self._state = dict(StoredState(base))
        self._device = device
        self._model, self._names = load_vit(base, self._state)
        self._model.to(device)
        self._pixels = pixel_values(paths, image_processor(base))  # (n, 3, height, width)
        # Kept from a model that took the same way as the recovered ones, so that equal weights are at distance 0.
        self._reference = [[b.cpu() for b in batch] for batch in self._activations({}, REFERENCE)]

    def score(self, weights: Weights, label: str | None) -> dict[str, float]:
        """Mean distance over images: `act_dist` after the last block, and each block's when all were asked for."""
        total: Tensor | float = 0.0
        for ours, true in zip(self._activations(weights, label), self._reference, strict=True):
            total = total + torch.stack([cosine_distance(o.cpu(), t).sum() for o, t in zip(ours, true, strict=True)])
        distances = (total / len(self._pixels)).tolist()  # type: ignore[union-attr]
        scores = {self._metric.column: distances[-1]}
        if self._metric.blocks == "all":
            scores |= {f"{self._metric.column}_block_{i:02}": distance for i, distance in enumerate(distances)}
        return scores

    def _activations(self, weights: Weights, label: str | None) -> Any:
        """Batch by batch, each wanted block's image vectors: (batch, width), or (batch, tokens * width) flattened."""
        state = with_weights(self._state, {name: weight for (_, name), weight in weights.items()})
        self._model.load_state_dict({self._names[name]: tensor for name, tensor in state.items()})
        encoder = self._model.base_model
        wanted = slice(1, None) if self._metric.blocks == "all" else slice(-1, None)
        with torch.no_grad(), tqdm(total=len(self._pixels), desc=label, unit="image", delay=5, leave=False) as bar:
            for pixels in self._pixels.split(self._metric.batch_size):
                # The embeddings come first, then each block's output; none of them has seen the final layer norm.
                blocks = encoder(pixels.to(self._device), output_hidden_states=True).hidden_states[wanted]
                flat = self._metric.tokens == "flatten"
                yield [b.flatten(1) if flat else b.double().mean(1) for b in blocks]  # b: (batch, tokens, width)
                bar.update(len(pixels))


def load_vit(base: Path, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, str]]:
    """A ViT classifier for a base's state dict, and by transformers' own renaming where in it each tensor belongs.

    state: in checkpoint names; its tensors are not in the model yet. Returns (model, {checkpoint name: model's name}).
    Raises LowraError when a weight is missing or left over.
    """
    with uncollected():
        from transformers import AutoConfig, ViTForImageClassification

    # Loading takes as long as the images' way through a small model, so that a model is loaded once, with numbered
    # tensors in place of the weights: they show what went where.
    numbered = {name: torch.full(tensor.shape, float(i)) for i, (name, tensor) in enumerate(state.items())}
    with quiet():
        loaded: Any = ViTForImageClassification.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(base),
            state_dict=numbered,
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, info = loaded
    given, held = list(state), model.state_dict()
    names = {given[int(held[name].flatten()[0])]: name for name in held if name not in info["missing_keys"]}
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"], *(set(given) - set(names))}):
        raise LowraError(
            f"The base checkpoint does not fit ViTForImageClassification: {wrong[0]!r} is missing or left over "
            f"({len(wrong)} such weights); give the base model with its classifier."
        )
    return model.eval(), names


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of paired rows in float64. a, b: (n, width). Returns (n,).

    Computed as |a/|a| - b/|b||^2 / 2, which is the same number without the cancellation in 1 - cos: never negative,
    0 for equal rows, and exact down to distances far below float64's epsilon. No clamp is needed.
    """
    a, b = a.double(), b.double()
    unit_a, unit_b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    return (unit_a - unit_b).square().sum(1) / 2
