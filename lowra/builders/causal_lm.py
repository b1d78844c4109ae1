"""Causal language models: supervised fine-tuning, then direct preference optimisation, by TRL and PEFT.

With `conf/builder/mistral_*.yaml` these are the Mistral subsets (Appendix D.2). Fifteen LoRAs a stage; model s trains
on its own random 80% of the data, drawn with seed s. The miniature is the same code on a small model and on rows made
of the interpreter's documentation (`causal_lm_mini`).

Deviations from the paper, and what it leaves open:

1.  Tables 6 and 7 give seeds 0 to 15, the text 15 models: seeds are 0 to 14.
2.  Lengths, packing, text format, optimizer and DPO's beta are not stated. They are the fields of `conf/builder`, with
    a reason each; most are the alignment-handbook's of January 2024, whose recipe the paper's values follow.
3.  Current PEFT trains adapters in float32 on a bfloat16 base; PEFT of early 2024 trained them in the base's precision.
4.  TRL packs ("wrapped") within batches of 1000 rows and keeps each batch's short tail; TRL of early 2024 packed in
    buffers of 7.5 million characters and dropped the tail.
5.  "DPO continues the SFT model" has several readings: see `DpoBuilder`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from tqdm import tqdm

from lowra.bench.schema import write_dataset
from lowra.builders.base import Built, check_trainer_names, recipe_key
from lowra.builders.causal_lm_mini import DocumentationPreferences, Miniature
from lowra.builders.kinds import KINDS, Kinds, Settings, Tuning, save_difference, weights_of
from lowra.builders.peft_adapters import lora_layers
from lowra.builders.stages import finished, stage
from lowra.checkpoints.reading import component_folder
from lowra.checks import (
    Count,
    Filled,
    Name,
    Names,
    Number,
    OneOf,
    Positive,
    Range,
    Rate,
    Share,
    check_fields,
)
from lowra.errors import LowraError, unknown
from lowra.quiet import quiet

DTYPES = ("bfloat16", "float16", "float32")
CONTINUES = ("base", "merged_sft", "sft_adapter")
LOSSES = ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down")  # TRL's that ask for nothing but pairs and beta


class Data(Protocol):
    """A source of training rows."""

    def load(self) -> Any:
        """All rows, a `datasets.Dataset`."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of a data set on the Hub or in a local folder (parquet, JSON, JSON lines, or `save_to_disk`).

    revision: the commit on the Hub, None for the newest; it has no meaning for a folder.
    """

    path: Name
    split: Name
    revision: str | None

    def load(self) -> Any:
        """Load the split. Raises LowraError when it cannot be had."""
        from datasets import load_dataset, load_from_disk

        folder = Path(self.path)
        try:
            if folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
                stored = load_from_disk(str(folder))
                return stored[self.split] if (folder / "dataset_dict.json").exists() else stored
            return load_dataset(self.path, split=self.split, revision=None if folder.is_dir() else self.revision)
        except Exception as error:  # many kinds, all meaning that it cannot be had: offline, missing, no such split
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise LowraError(
                f"Cannot load split {self.split!r} of {self.path!r}: {first} "
                "Give builder.data.path=FOLDER with parquet or JSON files, or use source=mini."
            ) from None


@dataclass(frozen=True)
class _Stage:
    """What SFT and DPO have in common. Sizes are in tokens, sequences and rows; rates are those of one model.

    data: the training rows, None where the miniature has its own. n_models: LoRAs of the subset, seeds 0 to
    n_models - 1. models: which of them to build now, None for all. fraction: of the rows that one model sees.
    rank, alpha, dropout, targets: the LoRA.
    warmup: share of the steps. batch x accumulation: sequences (SFT) or pairs (DPO) of one step. max_length: tokens of
    one sequence. dtype: precision the base is loaded and trained in. save_steps: steps between checkpoints that a
    killed build resumes from, 0 for none. eval_rows: held-out rows scored before and after training, 0 for none.
    """

    data: Rows | Data | None
    n_models: Annotated[int, Range(2)]
    models: Annotated[Sequence[int], Filled()] | None = field(metadata={"recipe": False})
    fraction: Annotated[float, Range(0, 1, above=True)]
    rank: Count
    alpha: Positive
    dropout: Rate
    targets: Names
    learning_rate: Positive
    scheduler: Name
    warmup: Share
    epochs: Positive
    batch: Count
    accumulation: Count
    max_length: Annotated[int, Range(2)]
    optimizer: Name
    dtype: Annotated[str, OneOf(DTYPES)]
    attention: Name
    gradient_checkpointing: bool
    save_steps: Number
    eval_rows: Number
    logging_steps: Count

    def _wanted(self) -> list[int]:
        """The seeds to build now. Raises LowraError for a seed that the subset does not have."""
        wanted = list(range(self.n_models)) if self.models is None else sorted(set(self.models))
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.n_models:
            raise LowraError(
                f"builder.models={list(self.models or ())} does not name models of this subset; "
                f"expected some of 0 to {self.n_models - 1}, or null for all."
            )
        return wanted

    def _check_stage(self) -> None:
        check_fields(self, "builder")
        self._wanted()
        check_trainer_names(("optimizer", self.optimizer), ("scheduler", self.scheduler))
        if (gpus := torch.cuda.device_count()) > 1:
            raise LowraError(
                f"{gpus} GPUs are visible and one trains one model: set CUDA_VISIBLE_DEVICES to one of them, and start "
                "a process a GPU, each with its own builder.models=[...]."
            )

    def _check_targets(self, model: Any) -> None:
        """Raise LowraError unless every target is a linear layer of the model, wide enough for the rank."""
        from torch import nn

        shapes: dict[str, list[int]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                shapes.setdefault(name.split(".")[-1], []).append(min(module.weight.shape))
        for target in self.targets:
            if target not in shapes:
                raise unknown("module in builder.targets", target, shapes)
        if self.rank > (narrow := min(min(shapes[target]) for target in self.targets)):
            raise LowraError(f"builder.rank is {self.rank}; the narrowest of builder.targets holds 1 to {narrow}.")

    def _load(self, source: Any, columns: Sequence[str]) -> Any:
        """The rows. Raises LowraError when a column is missing, does not hold messages, or there are too few rows."""
        if source is None:
            raise LowraError("There is no training data: give builder.data.path=..., or use source=mini.")
        rows = source.load()
        if missing := [column for column in columns if column not in rows.column_names]:
            raise LowraError(
                f"The training data lacks column {', '.join(missing)}; it has {', '.join(rows.column_names)}. "
                f"Expected {', '.join(columns)}, each a list of messages with 'role' and 'content'."
            )
        if int(self.fraction * len(rows)) < 1:
            raise LowraError(f"{self.fraction:.0%} of {len(rows)} training rows is none; give more rows.")
        for column in columns:
            messages = rows[0][column]
            if not (isinstance(messages, list) and messages and {"role", "content"} <= set(messages[0])):
                raise LowraError(
                    f"Column {column!r} of the training data does not hold messages but {str(messages)[:60]!r}; "
                    "expected a list of {'role': ..., 'content': ...}."
                )
        return rows

    def _split(self, rows: Any, seed: int) -> tuple[Any, Any]:
        """A model's own random share of the rows, and `eval_rows` of those left out."""
        shuffled = rows.shuffle(seed=seed)
        cut = int(self.fraction * len(rows))
        return shuffled.select(range(cut)), shuffled.select(range(cut, min(len(rows), cut + self.eval_rows)))

    def _arguments(self, folder: Path, seed: int, quiet: bool) -> dict[str, Any]:
        """The fields that TRL's SFTConfig and DPOConfig share."""
        return {
            "output_dir": str(folder / "checkpoints"),
            "seed": seed,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.scheduler,
            "warmup_steps": self.warmup,  # below 1 it is a share of the steps
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_length": self.max_length,
            "optim": self.optimizer,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": self.dtype == "bfloat16",
            "fp16": self.dtype == "float16",
            "gradient_checkpointing": self.gradient_checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if self.gradient_checkpointing else None,
            "save_strategy": "steps" if self.save_steps else "no",
            "save_steps": self.save_steps or 1,
            "save_total_limit": 1,
            "logging_steps": self.logging_steps,
            "disable_tqdm": quiet,
            "report_to": "none",
            "dataloader_pin_memory": torch.cuda.is_available(),
        }

    @property
    def tuning(self) -> Tuning:
        """The kind of fine-tuning with its sizes: plain LoRA."""
        return Tuning("lora", self.rank, self.alpha, self.dropout, tuple(self.targets), task="CAUSAL_LM")

    def _model(self, base: Path) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, self.dtype), attn_implementation=self.attention, use_safetensors=True
        )


def _run(trainer: Any, folder: Path, save: Callable[[Any], None] | None = None) -> dict[str, Any]:
    """Train, resuming from a checkpoint in `folder` if there is one, and save the adapter there.

    save: writes what was trained, where it is no adapter of PEFT's.

    Returns the losses of the first and the last log entry (nats per token for SFT) and, with held-out rows, what
    the trainer evaluates on them after training; `before` holds the same before training.
    """
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    trainer.remove_callback(PrinterCallback)  # it prints every log entry where progress bars are off
    checkpoints = folder / "checkpoints"
    resume = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    report: dict[str, Any] = {}
    if trainer.eval_dataset is not None and not resume:
        report["before"] = _scores(trainer.evaluate())
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    report |= {"steps": trainer.state.global_step, "loss_first": logs[0]["loss"], "loss_last": logs[-1]["loss"]}
    if trainer.eval_dataset is not None:
        report["after"] = _scores(trainer.evaluate())
    if save is not None:
        save(trainer.model)
    else:
        # DPO keeps a frozen copy of a continued adapter, "ref"; only the trained one is the result.
        trainer.model.save_pretrained(folder, selected_adapters=["default"])
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    kept = ("loss", "rewards/accuracies", "rewards/margins")
    return {name: metrics[f"eval_{name}"] for name in kept if f"eval_{name}" in metrics}


@dataclass(frozen=True)
class SftBuilder(_Stage):
    """Supervised fine-tuning on chats (Table 6).

    base: Hub id or folder of the base model, None in miniature. data: rows with a column `messages`, None in miniature.
    miniature: what takes their place.
    chat_template: Jinja text, None for the tokenizer's own. system: the message put in front of chats that have none
    (None puts none). packing: whether rows are joined and cut to `max_length`, or each is a sequence of its own.
    kind: of fine-tuning, see `lowra.builders.kinds`. kinds: what each kind has otherwise than LoRA in this recipe.
    """

    base: str | None
    miniature: Miniature | None
    chat_template: str | None
    system: str | None
    packing: bool
    kind: Annotated[str, OneOf(KINDS)]
    kinds: Kinds = field(metadata={"recipe": False})  # of which only the kind's own matters:
    own: Settings | None = field(init=False)

    def __post_init__(self) -> None:
        # An unknown kind is `check`'s to refuse.
        object.__setattr__(self, "own", self.kinds.of(self.kind) if self.kind in KINDS else None)

    @property
    def tuning(self) -> Tuning:
        """The kind of fine-tuning with its sizes."""
        own = self.kinds.of(self.kind)
        sizes = (own.rank or self.rank, own.alpha or self.alpha, self.dropout, tuple(self.targets), own.size)
        return Tuning(self.kind, *sizes, task="CAUSAL_LM")

    def check(self) -> None:
        """Raise LowraError for what would stop the build later: base, chat template, rows, impossible settings.

        Small files of the base and the whole of the data are fetched for it.
        """
        self._check_stage()
        model = self.check_base()
        self._check_targets(model)
        self.tuning.check(model.config.hidden_size)
        if self.miniature is None:
            self._load(self.data, ["messages"])

    def check_base(self) -> Any:
        """The base model without weights (on the meta device).

        Raises LowraError when it is missing, or its tokenizer lacks the chat template that the recipe does not give.
        """
        if self.miniature is not None:
            if self.base is not None or self.data is not None:
                raise LowraError(
                    "builder.base and builder.data are for builds from a given model and rows, and builder.miniature "
                    "makes its own; use source=build, or builder.miniature=null."
                )
            if self.chat_template is None:
                raise _no_template("The miniature's tokenizer")
            model = self.miniature.model
            model.check()
            with torch.device("meta"):
                return model.new_model(model.vocab_size, 1, 2)
        if self.base is None:
            raise LowraError("There is no base model: give builder.base=..., a Hub id or folder, or use source=mini.")
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = Path(self.base)
        try:
            config = AutoConfig.from_pretrained(self.base)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            tokenizer = AutoTokenizer.from_pretrained(self.base)
        except Exception as error:  # many kinds, all meaning that there is no usable model
            first = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"{folder} is not a model with its tokenizer" if folder.is_dir() else f"{self.base!r} cannot be had"
            raise LowraError(
                f"Base model: {what} ({first}) Give builder.base=FOLDER with a transformers checkpoint, "
                "or use source=mini."
            ) from None
        if self.chat_template is None and tokenizer.chat_template is None:
            raise _no_template(f"The tokenizer of {self.base}")
        return model

    def build(self, folder: Path) -> Built:
        """Make the subset in `folder`: base (in miniature), adapters, data set.

        With `models` given, the data set is written by the call that finds all adapters there; until then the call
        ends with a LowraError that says which are missing.
        """
        base = self.base_folder(folder)
        self.adapters(folder)
        return self.finish(folder, base, self, "sft", {"base": self.base_report(folder)})

    def base_folder(self, folder: Path) -> Path:
        """The base checkpoint's folder: fetched, or trained in miniature and kept in `folder`."""
        if self.miniature is None:
            return component_folder(str(self.base))
        home = self._home(folder)
        with quiet() if self.quiet else nullcontext():
            stage(home / "base", self.miniature.model.build)
        return home / "base"

    def _home(self, folder: Path) -> Path:
        """The folder of the base: LoRA's recipe's, so that models of different kinds have one."""
        if self.kind == "lora":
            return folder
        plain = dataclasses.replace(self, kind="lora")
        return folder.with_name(folder.name.removesuffix(recipe_key(self)) + recipe_key(plain))

    def base_report(self, folder: Path) -> dict[str, Any]:
        """Numbers about the miniature's pre-training; empty for a published base."""
        return finished(self._home(folder) / "base") or {}

    def adapters(self, folder: Path) -> list[Path]:
        """Train what is missing of the wanted models; their adapter folders, in order."""
        paths = {seed: folder / "adapters" / f"{seed:02d}" for seed in self._wanted()}
        missing = {seed: path for seed, path in paths.items() if finished(path) is None}
        if missing:
            with quiet() if self.quiet else nullcontext():
                base = self.base_folder(folder)
                tokenizer = self.tokenizer(base)
                rows = self._tokens(tokenizer)
                for seed, path in tqdm(missing.items(), desc="SFT", unit="model", leave=False):
                    stage(path, partial(self._train, seed=seed, base=base, tokenizer=tokenizer, rows=rows))
        return list(paths.values())

    @property
    def quiet(self) -> bool:
        """Whether the libraries' own progress bars are off: a miniature's models take seconds each."""
        return self.miniature is not None

    def tokenizer(self, base: Path) -> Any:
        """The base's tokenizer with the chat template, padding with </s> as the handbook does."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = tokenizer.eos_token
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def render(self, tokenizer: Any, messages: list[dict[str, str]]) -> str:
        """A chat as text, the system message put in front when it has none."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def _tokens(self, tokenizer: Any) -> Any:
        """All rows as token ids, once for all models: <s> text </s>, every token counting in the loss."""
        eos = tokenizer.eos_token_id

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            texts = [self.render(tokenizer, messages) for messages in batch["messages"]]
            ids = [[*row, eos] for row in tokenizer(texts)["input_ids"]]
            return {"input_ids": ids, "labels": ids}

        rows = self._load(self.data if self.miniature is None else self.miniature.data, ["messages"])
        return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing chats")

    def _train(self, folder: Path, seed: int, base: Path, tokenizer: Any, rows: Any) -> dict[str, Any]:
        from trl import SFTConfig, SFTTrainer

        train, held_out = self._split(rows, seed)
        model, save = self._model(base), None
        if self.kind == "full":
            self.tuning.freeze(model)
            save = partial(save_difference, before=weights_of(model, self.targets), folder=folder)
        arguments = self._arguments(folder, seed, self.quiet)
        arguments["learning_rate"] = self.kinds.of(self.kind).learning_rate or self.learning_rate
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **arguments,
                packing=self.packing,
                packing_strategy="wrapped",
                shuffle_dataset=True,
            ),
            train_dataset=train,
            eval_dataset=held_out if self.eval_rows else None,
            processing_class=tokenizer,
            peft_config=self.tuning.config(),
        )
        return _run(trainer, folder, save)

    def finish(self, folder: Path, base: Path, builder: _Stage, name: str, report: dict[str, Any]) -> Built:
        """Write the data set of all adapters in `folder`, and what the metric needs in miniature.

        Raises LowraError when some of the subset's models are not built yet.
        """
        adapters = {f"{name}-{seed:02d}": folder / "adapters" / f"{seed:02d}" for seed in range(builder.n_models)}
        reports = {label: finished(path) for label, path in adapters.items()}
        if missing := [label for label, report in reports.items() if report is None]:
            raise LowraError(
                f"{builder.n_models - len(missing)} of {builder.n_models} models are built in {folder}; the data set "
                f"is written once all are there. Still to build: {', '.join(missing)} (builder.models=[...])."
            )

        def write(place: Path) -> None:
            pre_ft_name = "mini-mistral" if self.base is None else self.base
            layers = tqdm(lora_layers(base, adapters, pre_ft_name=pre_ft_name), desc="write layers", leave=False)
            write_dataset(layers, place / "parquet")

        stage(folder / "dataset", write)
        evaluation = None
        if self.miniature is not None:
            evaluation = folder / "evaluation"
            stage(evaluation, _write_prompts)
        models = [report for report in reports.values() if report is not None]
        return Built(folder / "dataset" / "parquet", str(base), evaluation, report | {name: _mean(models)})


@dataclass(frozen=True)
class DpoBuilder(_Stage):
    """Direct preference optimisation on pairs (Table 7).

    sft: the stage before, whose base, tokenizer and text format this one shares; sft_subset: the subset that it is, as
    whose it is kept in the cache. data: rows with columns `chosen` and `rejected`, None in miniature. miniature: what
    takes their place. beta, loss: DPO's. max_prompt_length: tokens a prompt keeps, from its end, where a pair is too
    long.
    continues: what DPO starts from, since the paper's "continues the training of the SFT model" has several readings.
    In all of them the data set holds W = the base's weight and an update of rank r:

    - "merged_sft": model s starts from the base with SFT adapter s merged in, and trains a fresh adapter against that
      model as the reference. The data set holds the fresh adapter alone, on the base's weights. (Both updates together
      have rank up to 2r, which the benchmark's rank r rules out; and the merged models of different s share no
      pre-fine-tuning weights.)
    - "sft_adapter": SFT adapter s itself is trained on, against a frozen copy of it. The update is SFT's and DPO's.
    - "base": a fresh adapter on the base, against the base. There is no SFT stage.
    """

    sft: SftBuilder
    sft_subset: Name = field(metadata={"recipe": False})
    miniature: DocumentationPreferences | None
    continues: Annotated[str, OneOf(CONTINUES)]
    beta: Positive
    loss: Annotated[str, OneOf(LOSSES)]
    max_prompt_length: Count

    def check(self) -> None:
        """Raise LowraError for what would stop the build later, in this stage or in the SFT stage it continues."""
        self._check_stage()
        if self.max_prompt_length >= self.max_length:
            raise LowraError(
                f"builder.max_prompt_length={self.max_prompt_length} leaves no room for answers in "
                f"builder.max_length={self.max_length}; give a smaller one."
            )
        if self.continues == "sft_adapter" and (self.rank, self.alpha) != (self.sft.rank, self.sft.alpha):
            raise LowraError(
                f"DPO continues the SFT adapter, whose rank and alpha are {self.sft.rank} and {self.sft.alpha}; "
                f"builder.rank={self.rank} and builder.alpha={self.alpha} must be the same."
            )
        self._check_targets(self.sft.check_base())
        if self.sft.kind != "lora":
            raise LowraError(f"builder.sft.kind is {self.sft.kind}; DPO continues SFT models that are LoRAs (lora).")
        if self.miniature is not None and self.data is not None:
            raise LowraError("builder.data and builder.miniature are both given; set one of them to null.")
        if self.miniature is None:
            self._load(self.data, ["chosen", "rejected"])
        if self.continues != "base":
            self._sft().check()

    @property
    def base(self) -> str | None:
        """The base model: the SFT stage's."""
        return self.sft.base

    def _sft(self) -> SftBuilder:
        """The SFT stage of the models wanted here."""
        return dataclasses.replace(self.sft, models=self.models)

    def build(self, folder: Path) -> Built:
        """Make the subset in `folder`; the base and the SFT adapters are those of the SFT subset beside it.

        With `models` given, see `SftBuilder.build`.
        """
        sft = self._sft()
        sft_folder = self._sft_folder(folder)
        base = sft.base_folder(sft_folder)
        starts = dict.fromkeys(self._wanted())
        if self.continues != "base":
            starts = dict(zip(starts, sft.adapters(sft_folder), strict=True))
        self._adapters(folder, base, starts)
        return sft.finish(folder, base, self, "dpo", {"base": sft.base_report(sft_folder)})

    def _sft_folder(self, folder: Path) -> Path:
        """The SFT subset's cache folder, beside DPO's: both are named <subset>-<source>-<recipe key>."""
        source = folder.name.split("-")[-2]
        return folder.parent / f"{self.sft_subset}-{source}-{recipe_key(self.sft)}"

    def _adapters(self, folder: Path, base: Path, starts: Mapping[int, Path | None]) -> None:
        """Train what is missing of the wanted models. starts: seed to SFT adapter."""
        paths = {seed: folder / "adapters" / f"{seed:02d}" for seed in starts}
        missing = {seed: path for seed, path in paths.items() if finished(path) is None}
        if not missing:
            return
        with quiet() if self.sft.quiet else nullcontext():
            tokenizer = self.sft.tokenizer(base)
            rows = self._pairs(tokenizer)
            for seed, path in tqdm(missing.items(), desc="DPO", unit="model", leave=False):
                work = partial(self._train, seed=seed, base=base, start=starts[seed], tokenizer=tokenizer, rows=rows)
                stage(path, work)

    def _pairs(self, tokenizer: Any) -> Any:
        """All pairs as text: prompt = all turns but the last, answers = the last turn with its role's mark.

        That is the format of the handbook commit whose learning rate, schedule and epochs Table 7 has. TRL puts <s> in
        front of the prompt and </s> behind the answers. Where prompt and longer answer are longer than `max_length`,
        the prompt keeps its last `max_prompt_length` tokens; TRL cuts the answers' ends to what is left.
        """

        def encode(row: dict[str, Any]) -> dict[str, str]:
            *context, _ = row["chosen"]
            prompt = self.sft.render(tokenizer, context)
            # Rendered without the system message in front: it is the prompt's.
            chosen, rejected = (
                tokenizer.apply_chat_template(row[column][-1:], tokenize=False) for column in ("chosen", "rejected")
            )
            ids = tokenizer(prompt)["input_ids"]
            answer = max(len(tokenizer(text)["input_ids"]) for text in (chosen, rejected))
            if len(ids) + answer > self.max_length:
                prompt = tokenizer.decode(ids[-self.max_prompt_length :]).removeprefix(tokenizer.bos_token or "")
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

        rows = self._load(self.miniature or self.data, ["chosen", "rejected"])
        return rows.map(encode, remove_columns=rows.column_names, desc="Rendering pairs")

    def _train(
        self, folder: Path, seed: int, base: Path, start: Path | None, tokenizer: Any, rows: Any
    ) -> dict[str, Any]:
        from peft import PeftModel
        from trl import DPOConfig, DPOTrainer

        train, held_out = self._split(rows, seed)
        model = self._model(base)
        if start is not None:
            model = PeftModel.from_pretrained(model, str(start), is_trainable=self.continues == "sft_adapter")
            if self.continues == "merged_sft":
                model = model.merge_and_unload()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**self._arguments(folder, seed, self.sft.quiet), beta=self.beta, loss_type=[self.loss]),
            train_dataset=train,
            eval_dataset=held_out if self.eval_rows else None,
            processing_class=tokenizer,
            # A continued adapter brings its own configuration, and TRL makes its frozen copy the reference.
            peft_config=None if self.continues == "sft_adapter" else self.tuning.config(),
        )
        return _run(trainer, folder)


def _write_prompts(folder: Path) -> None:
    """The miniature's evaluation prompts."""
    prompts = files("lowra.metrics").joinpath("prompts_mini.json").read_text(encoding="utf-8")
    (folder / "prompts.json").write_text(prompts, encoding="utf-8")


def _no_template(whose: str) -> LowraError:
    return LowraError(
        f"{whose} has no chat template; give builder.chat_template (builder.sft.chat_template for DPO) as Jinja text, "
        "as conf/builder/mistral_sft_build.yaml does."
    )


def _mean(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over models of every number in their reports."""
    return {
        key: _mean([report[key] for report in reports])
        if isinstance(value, Mapping)
        else sum(report[key] for report in reports) / len(reports)
        for key, value in reports[0].items()
        if all(key in report for report in reports)
    }
