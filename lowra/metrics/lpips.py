"""LPIPS (Section 6.4): how far apart two image generators' pictures for the same prompts look.

Both pipelines draw the same prompts from the same start latents, 50 steps; the pictures are compared by the learned
perceptual distance of Zhang et al. 2018 (package `lpips`), 0 for equal pictures.

What the paper leaves open, and deviations:

1. Start latents are drawn once, on the CPU, from one generator with the seed: they differ between prompts, are the same
   for every model, and do not depend on the batch size or the device.
2. Pictures are rounded to 8 bits before they are compared, as the default pipeline returns them and as they are kept:
   the score can be computed again from the files.
3. `trunk: random` is for machines without the ImageNet weights. A random VGG is a weaker judge than a trained one; its
   numbers carry another name and are not the paper's.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.error import URLError

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lowra.checkpoints.reading import component_folder, load_state_dict, with_weights
from lowra.checks import Count, Name, OneOf, Range, Seed, Weight, check_fields
from lowra.digests import file_digest
from lowra.errors import LowraError
from lowra.files import replacing
from lowra.metrics.base import REFERENCE, Weights, digest, write_json
from lowra.packages import require
from lowra.quiet import quiet

RESOLUTION = 224
_TRUNK_SEED = 0
GRID_ROWS = 12  # prompts in a grid of pictures: what a page can show


@dataclass(frozen=True)
class Lpips:
    """The LPIPS column of Table 3; lower is closer.

    net: trunk network, vgg, alex or squeeze. trunk: its weights, "imagenet" (torchvision's) or "random" (fixed seed).
    trunk_path: a local file with torchvision's weights of that network; None uses torch.hub's cache, downloading once.
    captions: COCO's captions_val2014.json, a file or URL. n_prompts: how many of its captions, in the file's order.
    A builder's own prompts, where it has some, take the place of both.
    steps, guidance, seed, batch_size: of the generation; start latents come from the seed.
    """

    net: Annotated[str, OneOf(tuple(_WEIGHTS))]
    trunk: Annotated[str, OneOf(("imagenet", "random"))]
    trunk_path: Name | None
    captions: Name
    n_prompts: Count
    steps: Annotated[int, Range(1, 1000)]  # Stable Diffusion's noise schedule has 1000 to choose from
    guidance: Weight
    seed: Seed
    batch_size: Count

    column: ClassVar[str] = "lpips"
    kinds: ClassVar[tuple[str, ...]] = ("text_to_image",)
    keeps_outputs: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("trunk_path", "captions")

    @property
    def pretty(self) -> str:
        """The heading in tables; a random trunk always shows."""
        return "LPIPS (random trunk)" if self.trunk == "random" else "LPIPS"

    def ready(self) -> None:
        """Raise LowraError for settings that cannot be, missing packages, or missing trunk weights.

        What has to be downloaded is: better now than after hours of recovery.
        """
        check_fields(self, "metrics.lpips")
        require("LPIPS", "diffusers", "transformers", "lpips", "torchvision")
        if self.trunk == "imagenet":
            load_trunk(self.net, self.trunk_path)

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        """Raise LowraError for missing prompts or components of the base model."""
        self.read_prompts(evaluation)
        if base:
            for component in ("unet", "text_encoder", "vae"):
                component_folder(base, component)

    def inputs(self, evaluation: Path | None) -> str:
        """A digest of the prompts and the judge: its trunk and the heads that the package brings."""
        trunk = file_digest(trunk_file(self.net, self.trunk_path)) if self.trunk == "imagenet" else _TRUNK_SEED
        return digest(self.read_prompts(evaluation), trunk, file_digest(_heads_file(self.net)))

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path | None) -> LpipsScorer:
        """Load the base pipeline and the judge, and draw the reference pictures."""
        return LpipsScorer(self, Path(component_folder(base)), self.read_prompts(evaluation), device, artifacts)

    def gallery(self, artifacts: Path, columns: Mapping[str, str], folder: Path, title: str) -> list[Path]:
        """`images.png`: a row per prompt, a column per model (Figs. 3 and 14 to 16)."""
        from lowra.reporting.images import write_grid

        headings = list(columns.values())
        out = folder / "images.png"
        return [write_grid(artifacts, list(columns), out, title, GRID_ROWS, headings)]

    def read_prompts(self, evaluation: Path | None) -> list[str]:
        """All prompts of the builder's `prompts.json`, or the first `n_prompts` COCO captions.

        Raises LowraError when they cannot be had or are fewer.
        """
        if evaluation is not None:
            path = evaluation / "prompts.json"
            prompts = _read_json(path)
            if not isinstance(prompts, list) or not prompts:
                raise LowraError(f"{path} holds no list of prompts; build the subset again.")
            return [str(prompt) for prompt in prompts]
        path = self._captions_file()
        content = _read_json(path)
        if not isinstance(content, dict) or "annotations" not in content:
            raise LowraError(f"{path} is not in COCO's captions format; expected an object with 'annotations'.")
        captions = [str(annotation["caption"]).strip() for annotation in content["annotations"]]
        if len(captions) < self.n_prompts:
            raise LowraError(
                f"{path} holds {len(captions)} captions and {self.n_prompts} are asked for; give a longer file, or "
                f"metrics.lpips.n_prompts={len(captions)}."
            )
        return captions[: self.n_prompts]

    def _captions_file(self) -> Path:
        if not self.captions.startswith(("http://", "https://")):
            return Path(self.captions).expanduser()
        path = Path(torch.hub.get_dir()) / self.captions.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.captions, str(path))
            except (URLError, OSError) as error:
                raise LowraError(
                    f"Cannot download the prompts from {self.captions} ({error}); give metrics.lpips.captions=FILE "
                    "with a local captions_val2014.json."
                ) from None
        return path


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise LowraError(
            f"The prompts file {path} does not exist; give metrics.lpips.captions=FILE with COCO's "
            "captions_val2014.json."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LowraError(f"{path} is no readable JSON ({error}).") from None


# ---- The judge --------------------------------------------------------------------------------------------------

# torchvision's ImageNet weights of each trunk, the ones LPIPS was calibrated on.
_WEIGHTS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}


def load_trunk(net: str, path: str | None) -> dict[str, Tensor]:
    """State dict of torchvision's trunk network, from a file or from torch.hub's cache (downloading once).

    Raises LowraError saying how to get it when there is none.
    """
    url = _WEIGHTS[net]
    try:
        if path is not None:
            return torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: offline, missing, truncated, refused, not a state dict
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LowraError(
            f"No trunk weights of {net} for LPIPS at {trunk_file(net, path)} ({first}); download {url}, give it as "
            "metrics.lpips.trunk_path=FILE, or use metrics.lpips.trunk=random, which is another metric."
        ) from None


def trunk_file(net: str, path: str | None) -> Path:
    """Where torchvision's weights of a trunk network lie: the given file, or torch.hub's copy."""
    if path is not None:
        return Path(path).expanduser()
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS[net].rsplit("/", 1)[-1]


def _heads_file(net: str) -> Path:
    spec = importlib.util.find_spec("lpips")
    assert spec is not None  # ready() asked for it
    assert spec.origin is not None
    return Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth"


class Judge:
    """LPIPS against fixed reference pictures, whose features are computed once."""

    def __init__(self, net: str, trunk: str, trunk_path: str | None, device: torch.device) -> None:
        import lpips

        # Random weights of a fixed seed, without touching anybody's random numbers.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in its old way
            torch.manual_seed(_TRUNK_SEED)
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if trunk == "imagenet":
            state = load_trunk(net, trunk_path)
            # The package cuts torchvision's `features` into slices and keeps their indices: slice2.5 is features.5.
            keys = {key: f"features.{key.split('.', 1)[1]}" for key in model.net.state_dict()}
            try:
                model.net.load_state_dict({key: state[source] for key, source in keys.items()})
            except (KeyError, RuntimeError) as error:
                raise LowraError(
                    f"{trunk_path or 'The cached file'} does not hold torchvision's {net} weights ({error})."
                ) from None
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-normalised features per trunk layer (n, c, h, w) of 8-bit images (n, 3, H, W)."""
        from lpips import normalize_tensor

        scaled = images.to(self.device).float() / 127.5 - 1
        scaled = F.interpolate(scaled, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        outputs = self.model.net(self.model.scaling_layer(scaled))
        return [normalize_tensor(output) for output in outputs]

    @torch.no_grad()
    def distance(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """LPIPS (n,) between the pictures of two lists of features: `lpips.LPIPS.forward` from its features on."""
        layers = zip(self.model.lins, one, other, strict=True)
        return torch.stack([head((a - b).square()).mean(dim=(1, 2, 3)) for head, a, b in layers]).sum(0)


# ---- The pictures -----------------------------------------------------------------------------------------------


class LpipsScorer:
    """LPIPS of recovered pipelines against the pictures of one base pipeline."""

    def __init__(
        self, settings: Lpips, base: Path, prompts: Sequence[str], device: torch.device, artifacts: Path | None
    ) -> None:
        from diffusers import StableDiffusionPipeline

        self.settings = settings
        self.prompts = list(prompts)
        self.device = device
        self.artifacts = artifacts
        with quiet():
            self.pipeline = StableDiffusionPipeline.from_pretrained(
                base, safety_checker=None, requires_safety_checker=False
            ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.states = {name: load_state_dict(component_folder(base, name)) for name in ("unet", "text_encoder")}
        unet = self.pipeline.unet.config
        self.latents = torch.randn(
            (len(self.prompts), unet.in_channels, unet.sample_size, unet.sample_size),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self.judge = Judge(settings.net, settings.trunk, settings.trunk_path, device)
        if artifacts is not None:
            write_json(artifacts / "prompts.json", self.prompts)
        # Half of a score is the reference's features, so they are kept: 24 MB a picture for VGG.
        self.reference = [self.judge.features(batch) for batch in self._batches(self.draw({}, REFERENCE))]

    def score(self, weights: Weights, label: str | None) -> dict[str, float]:
        """Mean LPIPS over the prompts between a recovered pipeline's pictures and the base's.

        Raises LowraError for weights of layers or shapes that the base does not have.
        """
        batches = self._batches(self.draw(weights, label))
        distances = [
            self.judge.distance(self.judge.features(batch), reference)
            for batch, reference in zip(batches, self.reference, strict=True)
        ]
        return {self.settings.column: float(torch.cat(distances).mean())}

    @torch.no_grad()
    def draw(self, weights: Weights, label: str | None) -> Tensor:
        """The pictures (n, 3, H, W), 8 bits, of the base pipeline with `weights` put in; kept under a `label`."""
        self._load(weights)
        pictures = []
        rows = range(0, len(self.prompts), self.settings.batch_size)
        for start in tqdm(rows, desc=f"pictures of {label or 'a model'}", unit="batch", leave=False):
            part = slice(start, start + self.settings.batch_size)
            images = self.pipeline(
                self.prompts[part],
                latents=self.latents[part].to(self.device),
                num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance,
                output_type="pt",
            ).images  # (b, 3, H, W) in [0, 1]
            pictures.append((images * 255).round().to(torch.uint8).cpu())
        drawn = torch.cat(pictures)
        if self.artifacts is not None and label is not None:
            for i, picture in enumerate(drawn):
                with replacing(self.artifacts / label / f"{i:03d}.png") as temporary:
                    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary)
        return drawn

    def _load(self, weights: Weights) -> None:
        """Put recovered weights into both components, through state dicts in the checkpoint's names."""
        from transformers import CLIPTextModel

        parts: dict[str, dict[str, Tensor]] = {component: {} for component in self.states}
        for (component, name), weight in weights.items():
            if component not in parts:
                raise LowraError(f"Layer {name!r} is of component {component!r}; expected one of {', '.join(parts)}.")
            parts[component][name] = weight
        states = {component: with_weights(self.states[component], parts[component]) for component in parts}
        self.pipeline.unet.load_state_dict(states["unet"])
        # transformers renames checkpoint keys on load (`text_model.` is gone), so the library does it.
        # The pair is not in the library's annotations.
        with quiet():
            loaded: Any = CLIPTextModel.from_pretrained(
                None,
                config=self.pipeline.text_encoder.config,
                state_dict=states["text_encoder"],
                output_loading_info=True,
            )
        text_encoder, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            raise LowraError(
                f"The base's text encoder checkpoint lacks {', '.join(sorted(info['missing_keys']))}; it does not fit "
                "its configuration."
            )
        self.pipeline.text_encoder = text_encoder.to(self.device)

    def _batches(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return pictures.split(self.settings.batch_size)
