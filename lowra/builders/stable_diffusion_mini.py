"""The Stable Diffusion subset in miniature: the same classes, trained here, on a world of drawn pictures.

A latent diffusion pipeline (AutoencoderKL, CLIPTextModel, UNet2DConditionModel, the scheduler of SD 1.5) is trained
from nothing on captioned pictures until prompts control the picture. Fifteen personalisation LoRAs are then trained on
it, one style each, with PEFT on UNet and text encoder, and saved as kohya safetensors: what civitai serves. The
collector of `stable_diffusion.py` reads them as it reads the real ones.

What differs from the paper's subset, apart from the size:

1. The LoRAs of Table 8 were found, not trained, and no recipe of theirs is published. Ours follows diffusers'
   text-to-image LoRA training script, and the usual kohya habits of alpha = rank / 2 and float16 files.
2. The text encoder is first trained on image-text pairs, as SD's CLIP was, and then learns on with the UNet, where
   SD's is frozen.
3. The noise loss carries the truncated-SNR weight max(1, 1 / SNR) of Salimans & Ho 2022, capped. On pictures this
   small a noisy picture gives its colours away long before its caption is needed, and the plain loss hardly asks the
   caption.
4. The autoencoder sees plain and styled pictures, as SD's has seen more kinds of pictures than any LoRA shows it.
5. Pictures are generated with less guidance than the default 7.5, which burns the colours of so small a model, and in
   half of the default 50 steps.
6. Latents are the means of the encoder's distributions, encoded once, instead of fresh samples.
"""

# diffusers exports its classes lazily, through stand-ins that have none of their attributes.
# mypy: disable-error-code="attr-defined,operator,list-item"

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lowra.bench.updates import Update
from lowra.builders.kohya_files import Module, expected_modules, write_kohya
from lowra.builders.stable_diffusion_pictures import STYLES, Scene, describe, draw, random_scenes, style_statistics
from lowra.builders.stages import stage
from lowra.checks import Count, Filled, MultipleOf, Positive, Rate, Seed
from lowra.errors import LowraError
from lowra.quiet import quiet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

# scheduler/scheduler_config.json of SD 1.5; DDPM and PNDM share the noise schedule.
NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SAMPLER: dict[str, Any] = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}

# The modules of Appendix D.3 in the UNet, and their fellows in the text encoder: 12 per block and 6 per layer.
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Width = Annotated[int, MultipleOf(16)]  # of the UNet: its group norms have 16 groups

# Cap on the truncated-SNR weight (deviation 3).
MAX_WEIGHT = 8.0

# AutoencoderKL's latent distribution is held together by a faint pull to the normal distribution (Rombach et al. 2022).
KL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Miniature:
    """A small Stable Diffusion and LoRAs of it, trained on this machine.

    seed: of everything drawn here. image_size: in pixels.
    unet_channels: of the two resolutions; the first has cross attention, the second has not (as SD 1.5's last).
    text_width, text_layers: of the text encoder. vae_channels: one entry per resolution of the autoencoder, each half
    of the one before.
    pictures: size of the training set. *_steps, *_batch, *_lr: of the autoencoder, the text encoder alone, the whole
    base model and each LoRA (AdamW; constant rate for LoRAs, cosine to zero for the others). caption_dropout: share of
    empty captions, which classifier-free guidance needs. style_pictures: pictures per style, one style a LoRA.
    rank, alpha: of the LoRAs. control_prompts: prompts that prompt control is measured on; prompts: the first of them,
    which evaluate recovered models.
    """

    seed: Seed
    image_size: Count
    unet_channels: tuple[Width, Width]
    text_width: Annotated[int, MultipleOf(4)]
    text_layers: Count
    vae_channels: Annotated[Sequence[Annotated[int, MultipleOf(8)]], Filled()]
    pictures: Count
    vae_steps: Count
    vae_batch: Count
    vae_lr: Positive
    text_steps: Count
    text_batch: Count
    text_lr: Positive
    base_steps: Count
    base_batch: Count
    base_lr: Positive
    caption_dropout: Rate
    style_pictures: Count
    rank: Count
    alpha: Positive
    lora_steps: Count
    lora_batch: Count
    lora_lr: Positive
    control_prompts: Count
    prompts: Count

    def check(self, count: int) -> None:
        """Raise LowraError for sizes that do not go together, and for more LoRAs than there are styles."""
        if count > len(STYLES):
            raise LowraError(f"builder.count={count} LoRAs asked for; there are {len(STYLES)} styles.")
        narrow = min(*self.unet_channels, self.text_width)
        if self.rank > narrow:
            raise LowraError(f"rank={self.rank} does not fit layers of width {narrow}; give a rank from 1 to {narrow}.")
        if self.prompts > self.control_prompts:
            raise LowraError(f"prompts={self.prompts} must be from 1 to control_prompts={self.control_prompts}.")
        scale = 2 ** len(self.vae_channels)  # the UNet halves the latents once more
        if self.image_size % scale:
            raise LowraError(f"image_size={self.image_size} must be a multiple of {scale}.")

    def build(
        self, folder: Path, count: int, guidance: float, inference_steps: int
    ) -> tuple[dict[str, Path], dict[str, Any]]:
        """Train what is not trained yet: folder/base and `count` LoRAs; the evaluation's prompts.

        Returns the LoRA files by style, and numbers about the training. Every part is a stage: a killed build goes on
        where it was. guidance, inference_steps: of the pictures that the report judges.
        """
        look = {"guidance_scale": guidance, "num_inference_steps": inference_steps}
        report: dict[str, Any] = {"autoencoder": stage(folder / "vae", self._train_vae)}
        report["base"] = stage(folder / "base", partial(self._train_base, vae_folder=folder / "vae", look=look))
        styles = list(STYLES)[:count]
        report["loras"] = {
            style: stage(folder / "loras" / style, partial(self._train_lora, root=folder, style=style, look=look))
            for style in styles
        }
        report["evaluation"] = stage(folder / "evaluation", self._write_prompts)
        return {style: folder / "loras" / style / f"{style}.safetensors" for style in styles}, report

    # ---- Stages -------------------------------------------------------------------------------------------------

    def _train_vae(self, folder: Path) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        generator = self._seed(0)
        vae = AutoencoderKL(
            block_out_channels=tuple(self.vae_channels),
            down_block_types=("DownEncoderBlock2D",) * len(self.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(self.vae_channels),
            mid_block_add_attention=False,
            norm_num_groups=8,
            sample_size=self.image_size,
        )
        # Begin with almost deterministic latents: unit noise, the usual start, takes hundreds of steps to unlearn.
        with torch.no_grad():
            vae.quant_conv.bias[vae.config.latent_channels :] = -8.0
        scenes = random_scenes(self.pictures, generator)
        looks = [None, *STYLES]
        images = torch.cat(
            [draw(scenes[i :: len(looks)], self.image_size, generator, look) for i, look in enumerate(looks)]
        )
        images = images * 2 - 1

        def loss() -> Tensor:
            batch = images[torch.randint(len(images), (self.vae_batch,), generator=generator)]
            posterior = vae.encode(batch).latent_dist
            rebuilt = vae.decode(posterior.sample(generator)).sample
            return F.mse_loss(rebuilt, batch) + KL_WEIGHT * posterior.kl().mean()

        losses = _train([vae], loss, self.vae_steps, self.vae_lr, "autoencoder")
        vae.eval()
        with torch.no_grad():
            latents = vae.encode(images[:512]).latent_dist.mean
            rebuilt = vae.decode(latents).sample
        # The UNet wants latents of unit variance, as SD's 0.18215 gives them.
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        vae.save_pretrained(folder)
        error = F.mse_loss(rebuilt.clamp(-1, 1), images[:512]) / 4  # of pixels in [0, 1]
        return {"final_loss": losses, "psnr_db": float(-10 * error.log10())}

    def _train_base(self, folder: Path, vae_folder: Path, look: dict[str, Any]) -> dict[str, Any]:
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        generator = self._seed(1)
        scenes = random_scenes(self.pictures, generator)
        captions = [scene.caption for scene in scenes]
        tokenizer = make_tokenizer(captions)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.text_width,
                intermediate_size=4 * self.text_width,
                projection_dim=self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL.from_pretrained(vae_folder)
        unet = UNet2DConditionModel(
            sample_size=self.image_size // vae_scale(vae),
            block_out_channels=tuple(self.unet_channels),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=self.text_width,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        images = draw(scenes, self.image_size, generator)
        tokens = tokenize(tokenizer, captions)
        text_loss = train_text_encoder(
            text_encoder, images, tokens, self.text_steps, self.text_batch, self.text_lr, generator
        )
        losses = train_diffusion(
            unet,
            text_encoder,
            encode_images(vae, images),
            tokens,
            tokenize(tokenizer, [""])[0],
            steps=self.base_steps,
            batch_size=self.base_batch,
            lr=self.base_lr,
            schedule="cosine",
            caption_dropout=self.caption_dropout,
            generator=generator,
            title="base model",
        )
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=PNDMScheduler(**NOISE_SCHEDULE, **SAMPLER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        asked = self.scenes(self.control_prompts)
        shown = self._generate(pipeline, asked, look)
        save_images(shown, folder / "samples")
        seen = describe(shown)
        return {
            "text_loss": text_loss,
            "final_loss": losses,
            "prompt_control": {
                part: sum(getattr(a, part) == getattr(b, part) for a, b in zip(asked, seen, strict=True)) / len(asked)
                for part in ("shape", "colour", "background")
            },
        }

    def _train_lora(self, folder: Path, root: Path, style: str, look: dict[str, Any]) -> dict[str, Any]:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils import get_peft_model_state_dict

        generator = self._seed(2 + list(STYLES).index(style))
        pipeline = load_pipeline(root / "base")
        unet, text_encoder = pipeline.unet, pipeline.text_encoder
        scenes = random_scenes(self.style_pictures, generator)
        images = draw(scenes, self.image_size, generator, style)
        latents = encode_images(pipeline.vae, images)

        # By PEFT's own function: the models' `add_adapter` are wrappers of it that accept some versions of PEFT only.
        # It freezes everything but the factors.
        for model, targets in ((unet, UNET_TARGETS), (text_encoder, TEXT_TARGETS)):
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)  # type: ignore[arg-type]
            inject_adapter_in_model(config, model)
        losses = train_diffusion(
            unet,
            text_encoder,
            latents,
            tokenize(pipeline.tokenizer, [scene.caption for scene in scenes]),
            tokenize(pipeline.tokenizer, [""])[0],
            steps=self.lora_steps,
            batch_size=self.lora_batch,
            lr=self.lora_lr,
            schedule="constant",
            caption_dropout=0.0,
            generator=generator,
            title=f"LoRA {style}",
        )
        modules = expected_modules(str(root / "base"))
        write_kohya(
            folder / f"{style}.safetensors",
            {
                **peft_updates(modules, "unet", get_peft_model_state_dict(unet), style, self.alpha),
                **peft_updates(modules, "text_encoder", get_peft_model_state_dict(text_encoder), style, self.alpha),
            },
        )
        # How far the generated pictures have moved from the base model's to the style's own, in style statistics.
        shown = self._generate(pipeline, self.scenes(self.prompts), look)
        save_images(shown, folder / "samples")
        before = load_images(root / "base" / "samples", self.prompts)
        plain = draw(scenes, self.image_size, self._seed(100))
        styled = draw(scenes, self.image_size, self._seed(100), style)
        way = style_statistics(styled) - style_statistics(plain)
        moved = style_statistics(shown) - style_statistics(before)
        return {"final_loss": losses, "style_strength": float(moved @ way / way.square().sum())}

    def _write_prompts(self, folder: Path) -> None:
        captions = [scene.caption for scene in self.scenes(self.prompts)]
        (folder / "prompts.json").write_text(json.dumps(captions, indent=1) + "\n")

    # ---- Helpers ------------------------------------------------------------------------------------------------

    def scenes(self, count: int) -> list[Scene]:
        """The first `count` scenes that prompts of checks and of the evaluation ask for."""
        return random_scenes(count, torch.Generator().manual_seed(self.seed))

    def _seed(self, part: int) -> torch.Generator:
        """Seed one part of the build: the global generator (initial weights) and one for everything drawn."""
        torch.manual_seed(1000 * self.seed + part)
        return torch.Generator().manual_seed(1000 * self.seed + part)

    def _generate(self, pipeline: StableDiffusionPipeline, scenes: list[Scene], look: dict[str, Any]) -> Tensor:
        """Pictures (n, 3, size, size) in [0, 1] that the pipeline draws for the scenes' captions."""
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [scene.caption for scene in scenes],
            **look,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
        ).images


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from the captions: every word becomes one token."""
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    blank = CLIPTokenizer(vocab={start: 0, end: 1}, merges=[])
    tokenizer = blank.train_new_from_iterator(captions, vocab_size=1000, show_progress=False)
    tokenizer.model_max_length = 16
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (n, model_max_length), padded as the pipeline pads prompts."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def vae_scale(vae: AutoencoderKL) -> int:
    """Pixels per latent and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def load_pipeline(base: Path) -> StableDiffusionPipeline:
    """The pipeline stored in a diffusers folder, without a safety checker and without bars about loading it."""
    from diffusers import StableDiffusionPipeline

    with quiet():
        return StableDiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (n, 4, h, w) of images (n, 3, H, W) in [0, 1]."""
    latents = [vae.encode(batch * 2 - 1).latent_dist.mean for batch in images.split(128)]
    return torch.cat(latents) * vae.config.scaling_factor


def train_text_encoder(
    text_encoder: CLIPTextModel,
    images: Tensor,
    tokens: Tensor,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> float:
    """CLIP's contrastive training (Radford et al. 2021) against a small image tower that is thrown away.

    images: (n, 3, H, W) in [0, 1]. tokens: (n, length). Pictures of equal captions all count as right answers.
    Returns the final loss (see `_train`).
    """
    width = text_encoder.config.hidden_size
    tower = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 256), nn.GELU(), nn.Linear(256, width))
    temperature = 10.0

    def loss() -> Tensor:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        pictures = F.normalize(tower(images[rows]), dim=1)
        texts = F.normalize(text_encoder(tokens[rows]).pooler_output, dim=1)
        logits = temperature * pictures @ texts.T  # (b, b)
        same = (tokens[rows][:, None] == tokens[rows][None]).all(-1).float()
        targets = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    return _train([text_encoder, tower], loss, steps, lr, "text encoder")


def train_diffusion(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    schedule: str,
    caption_dropout: float,
    generator: torch.Generator,
    title: str,
) -> float:
    """Train whatever requires a gradient in both models to predict the noise in latents (epsilon prediction).

    latents: (n, 4, h, w). tokens: (n, length); empty: (length,), the tokens of no caption. Returns the final loss (see
    `_train`).
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        noisy = noise_scheduler.add_noise(latents[rows], noise, timesteps)  # (b, 4, h, w)
        dropped = torch.rand(batch_size, 1, generator=generator) < caption_dropout
        hidden = text_encoder(torch.where(dropped, empty, tokens[rows])).last_hidden_state  # (b, length, width)
        errors = (unet(noisy, timesteps, hidden).sample - noise).square().mean(dim=(1, 2, 3))
        weights = (1 / compute_snr(noise_scheduler, timesteps)).clamp(1, MAX_WEIGHT)
        return (weights * errors).mean()

    return _train([unet, text_encoder], loss, steps, lr, title, schedule)


def _train(
    models: list[nn.Module],
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    title: str,
    schedule: str = "cosine",
) -> float:
    """AdamW on `loss()`, gradients clipped to norm 1. Returns the mean loss of the last tenth of the steps."""
    from diffusers.optimization import get_scheduler

    for model in models:
        model.train()
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    rates = get_scheduler(schedule, optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    losses: list[float] = []
    bar = tqdm(range(steps), desc=title, leave=False)
    for step in bar:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(value.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    for model in models:
        model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def peft_updates(
    modules: list[Module], component: str, state: dict[str, Tensor], name: str, alpha: float
) -> dict[Module, Update]:
    """PEFT's factors (`<path>.lora_A.weight`, `<path>.lora_B.weight`) of one component, by module."""
    updates = {}
    for module in modules:
        if module.component == component:
            a, b = (state[f"{module.path}.lora_{part}.weight"].flatten(1) for part in "AB")  # (r, k), (d, r)
            updates[module] = Update(name, a.shape[0], alpha, a, b)
    return updates


def load_images(folder: Path, count: int) -> Tensor:
    """The first `count` pictures that `save_images` wrote, (n, 3, H, W) in [0, 1]."""
    pictures = [np.asarray(Image.open(folder / f"{i:03d}.png")) for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def save_images(images: Tensor, folder: Path) -> None:
    """Write images (n, 3, H, W) in [0, 1] as folder/000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
