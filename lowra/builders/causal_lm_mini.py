"""A causal language model in miniature, from text that is on every Python machine: the interpreter's documentation.

A small `MistralForCausalLM` and its tokenizer are trained on the standard library's documentation topics and
docstrings; chat rows and preference pairs are derived from the docstrings in the row formats of UltraChat-200k and
UltraFeedback-binarized. The text is that of the running interpreter, so other Python versions give other weights.
"""

from __future__ import annotations

import ast
import math
import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from tqdm import tqdm

from lowra.checks import Count, Positive, Range, Seed, Weight
from lowra.errors import LowraError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Entry:
    """One documented name: `summary` is its docstring's first sentence, `answer` its first paragraph."""

    module: str
    name: str
    kind: str
    summary: str
    answer: str
    docstring: str


@cache
def documentation() -> tuple[Entry, ...]:
    """The public functions and classes of the standard library's single-file modules that have a docstring.

    Sources are parsed, not imported: nothing runs. Raises LowraError where Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.glob("[a-z]*.py"))
    entries = []
    for path in tqdm(paths, desc="read docstrings", unit="module", delay=2, leave=False):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for parent in ast.walk(tree):
            scope = f"{parent.name}." if isinstance(parent, ast.ClassDef) else ""
            for node in ast.iter_child_nodes(parent):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                    continue
                docstring = ast.get_docstring(node)
                if not docstring or scope.startswith("_"):
                    continue
                answer = " ".join(docstring.split("\n\n")[0].split())
                if len(answer.split()) < 4:
                    continue
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                name = f"{path.stem}.{scope}{node.name}"
                summary = answer.split(". ")[0].rstrip(".") + "."
                entries.append(Entry(path.stem, name, kind, summary, answer, docstring))
    if len(entries) < 100:
        raise LowraError(
            f"{root} has {len(entries)} documented names; the miniature Mistral learns from the standard library's "
            "sources, so use a Python that has them."
        )
    return tuple(entries)


def corpus() -> list[str]:
    """The pre-training documents: the language reference's topics, then the docstrings, one name a document."""
    from pydoc_data.topics import topics

    return [*topics.values(), *(f"{entry.name}\n\n{entry.docstring}" for entry in documentation())]


@dataclass(frozen=True)
class DocumentationChats:
    """Chat rows in UltraChat's format: a column `messages` of {"role", "content"}, user and assistant in turns."""

    rows: Count
    seed: Seed

    def load(self) -> Dataset:
        """Two turns a row: what a name does, and where it is."""
        from datasets import Dataset

        chats = []
        for entry in _sample(self.rows, self.seed):
            turns = [
                ("user", f"What does {entry.name} do?"),
                ("assistant", entry.answer),
                ("user", "Where do I find it?"),
                ("assistant", f"It is a {entry.kind} of the module {entry.module}."),
            ]
            chats.append({"messages": [{"role": role, "content": content} for role, content in turns]})
        return Dataset.from_list(chats)


@dataclass(frozen=True)
class DocumentationPreferences:
    """Preference pairs in UltraFeedback's format: `prompt`, and `chosen` and `rejected` as lists of messages.

    The chosen answer is the docstring's first sentence. The rejected one has the same words in random order: no small
    model knows which of two well-formed answers is true, but it can learn to prefer the one in good order.
    """

    rows: Count
    seed: Seed

    def load(self) -> Dataset:
        """The pairs, one question each."""
        from datasets import Dataset

        shuffle = random.Random(self.seed)
        pairs: list[dict[str, Any]] = []
        for entry in _sample(self.rows, self.seed):
            question = f"What does {entry.name} do?"
            words = entry.summary.split()
            shuffle.shuffle(words)
            answers = {"chosen": entry.summary, "rejected": " ".join(words)}
            messages = {
                column: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for column, answer in answers.items()
            }
            pairs.append({"prompt": question, **messages})
        return Dataset.from_list(pairs)


def _sample(rows: int, seed: int) -> list[Entry]:
    entries = documentation()
    if rows > len(entries):
        raise LowraError(f"{rows} rows are asked for; this Python's standard library documents {len(entries)} names.")
    return random.Random(seed).sample(entries, rows)


@dataclass(frozen=True)
class MiniMistral:
    """A small Mistral and its tokenizer: sizes and pre-training recipe.

    steps and batch count sequences of `context` tokens; Muon (AdamW at half the rate for embeddings and norms), warm-up
    over a twentieth of the steps, then cosine to zero.
    """

    vocab_size: Annotated[int, Range(259)]  # 256 bytes and three special tokens
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    context: Annotated[int, Range(2)]
    steps: Count
    batch: Count
    learning_rate: Positive
    weight_decay: Weight
    seed: Seed

    def check(self) -> None:
        """Raise LowraError for sizes that do not go together."""
        if self.hidden_size % self.heads or self.heads % self.kv_heads or self.hidden_size // self.heads % 2:
            raise LowraError(
                f"hidden_size={self.hidden_size} must be an even multiple of heads={self.heads}, and these a multiple "
                f"of kv_heads={self.kv_heads}."
            )

    def build(self, folder: Path) -> dict[str, Any]:
        """Train tokenizer and model and write them as a bfloat16 checkpoint, as Mistral-7B-v0.1 is stored.

        Returns the mean losses, in nats per token, of the first and the last twentieth of the steps.
        """
        documents = corpus()
        tokenizer = self._tokenizer(documents)
        eos = tokenizer.eos_token_id
        ids = [token for document in tokenizer(documents)["input_ids"] for token in [*document, eos]]
        stream = torch.tensor(ids)  # (tokens,)
        torch.manual_seed(self.seed)
        model = self.new_model(len(tokenizer), tokenizer.bos_token_id, eos)
        losses = self._train(model, stream)
        edge = max(1, self.steps // 20)
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens_in_text": len(ids),
            "tokens_seen": self.steps * self.batch * self.context,
            "loss_first": sum(losses[:edge]) / edge,
            "loss_last": sum(losses[-edge:]) / edge,
        }

    def new_model(self, vocab_size: int, bos: int, eos: int) -> Any:
        """An untrained model: the architecture class of the full-size one."""
        from transformers import MistralConfig, MistralForCausalLM

        config = MistralConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8 * self.context,
            sliding_window=None,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=None,
        )
        return MistralForCausalLM(config)

    def _tokenizer(self, documents: list[str]) -> Any:
        """A byte-level BPE with Mistral's special tokens: <s> in front, no padding token (as published)."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(documents, trainer)
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        )

    def _train(self, model: Any, stream: torch.Tensor) -> list[float]:
        """Pre-train on windows (batch, context) of the token stream at random places; returns each step's loss.

        Muon for the layers' matrices: at this size it takes a minute to the loss that AdamW takes several to reach.
        """
        generator = torch.Generator().manual_seed(self.seed)
        inner = {name: value for name, value in model.named_parameters() if value.ndim == 2 and ".layers." in name}
        outer = [value for name, value in model.named_parameters() if name not in inner]
        optimizers = (
            torch.optim.Muon(
                list(inner.values()),
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(outer, lr=self.learning_rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
        )
        warmup = max(1, self.steps // 20)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
        offsets = torch.arange(self.context)
        losses = []
        model.train()
        for _ in (bar := tqdm(range(self.steps), desc="pre-train mini Mistral", unit="step", leave=False)):
            starts = torch.randint(len(stream) - self.context, (self.batch, 1), generator=generator)
            batch = stream[starts + offsets]  # (batch, context)
            loss = model(input_ids=batch, labels=batch).loss
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
        return losses


@dataclass(frozen=True)
class Miniature:
    """What supervised fine-tuning needs and the full-size recipe downloads: a base model and chats."""

    model: MiniMistral
    data: DocumentationChats
