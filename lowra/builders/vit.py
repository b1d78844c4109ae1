"""The ViT subset (App. D.1, Table 5): one image classifier, 15 LoRA fine-tunes on tasks of VTAB-1k.

`conf/builder/vit_build.yaml` is the paper's recipe at full size; `vit_mini.yaml` the same code with a small base,
pre-trained here, and tasks drawn here in the layout of VTAB-1k. Every part is kept in a folder of its own as soon as
it is finished, so a build that was stopped goes on where it was.

Deviations from the paper, or readings of what it leaves open:
1. Fields that Table 5 does not state follow PEFT's guide to image classification; `vit_build.yaml` marks each.
2. VTAB-1k comes as image files and lists, which hold the same images as the pinned TFDS versions behind the paper's
   data; they are resized by the base's own processor, with antialiasing, which VTAB's evaluation code does not do.
3. "Query and value" are called q_proj and v_proj in today's transformers; the data set has the checkpoint's names.
4. Every task trains with a seed of its own, so no two LoRAs share their random A.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lowra.bench.images import image_processor, pixel_values
from lowra.bench.schema import Layer, write_dataset
from lowra.builders.base import Built, check_trainer_names, recipe_key
from lowra.builders.kinds import KINDS, RANDOM_A, Kinds, Settings, Tuning, save_difference, weights_of
from lowra.builders.peft_adapters import Adapter, checkpoint_state, layer_names, lora_layers
from lowra.builders.stages import stage
from lowra.builders.vit_mini import Miniature
from lowra.builders.vit_pictures import TASKS
from lowra.checkpoints.detect import changed_weights
from lowra.checkpoints.reading import StoredState, component_folder
from lowra.checks import (
    Count,
    Filled,
    Name,
    Names,
    OneOf,
    Positive,
    Range,
    Rate,
    Seed,
    Share,
    Weight,
    check_fields,
)
from lowra.errors import LowraError, unknown
from lowra.quiet import quiet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")  # of a block, in memory
TRAIN_LIST, VAL_LIST = "train800.txt", "val200.txt"
_LINE = re.compile(r"^(\S+)\s+(\d+)$")


@dataclass(frozen=True)
class VitBuilder:
    """Fine-tune one ViT on image tasks by LoRA or another kind, and write base and updates as a benchmark data set.

    base: Hub id or folder of the base model, None where `miniature` pre-trains one.
    data: folder in the layout of VTAB-1k (`<task>/images/`, `train800.txt`, `val200.txt`), None to draw the tasks.
    miniature: what to pre-train and draw where there is no base and data.
    tasks: folder names of the tasks, in the order of the data set's LoRAs. Not part of the recipe: machines that
        build some tasks each in one folder make the parts of one subset.
    normalisation: "base" for the mean and standard deviation of the base's processor, "imagenet" for ImageNet's.
    resample: PIL's filter of the resize, "bilinear" or "bicubic".
    precision: "float32", or mixed "bfloat16", "float16". warmup: share of the steps.
    kind: of fine-tuning, see `lowra.builders.kinds`. kinds: what each kind has otherwise than LoRA in this recipe.
    shared_a: train only B, on one random A that is frozen and the same in all tasks: a defence against recovery, since
        all updates then share their row space. shared_among: so many tasks in a row share one, each group its own;
        None for all.
    seed: of everything; each task adds its own number, so that no two LoRAs start from the same A.
    """

    base: str | None
    data: str | None
    miniature: Miniature | None
    rank: Count
    alpha: Positive
    dropout: Rate
    target_modules: Annotated[Sequence[Annotated[str, OneOf(LINEAR_LAYERS)]], Filled()]
    modules_to_save: Sequence[str]
    learning_rate: Positive
    batch_size: Count
    gradient_accumulation: Count
    epochs: Count
    optimiser: Name
    schedule: Name
    warmup: Share
    weight_decay: Weight
    precision: Annotated[str, OneOf(("float32", "bfloat16", "float16"))]
    normalisation: Annotated[str, OneOf(("base", "imagenet"))]
    resample: Annotated[str, OneOf(("bilinear", "bicubic"))]
    kind: Annotated[str, OneOf(KINDS)]
    shared_a: bool
    shared_among: Annotated[int, Range(2)] | None
    seed: Seed
    use_cpu: bool
    dataset_dtype: Annotated[str, OneOf(("float32", "float16"))]
    tasks: Names = field(metadata={"recipe": False})
    kinds: Kinds = field(metadata={"recipe": False})  # of which only the kind's own matters:
    own: Settings | None = field(init=False)

    def __post_init__(self) -> None:
        # An unknown kind is `check`'s to refuse.
        object.__setattr__(self, "own", self.kinds.of(self.kind) if self.kind in KINDS else None)

    @property
    def tuning(self) -> Tuning:
        """The kind of fine-tuning with its sizes."""
        own = self.kinds.of(self.kind)
        sizes = (own.rank or self.rank, own.alpha or self.alpha, self.dropout, tuple(self.target_modules), own.size)
        return Tuning(self.kind, *sizes, heads=tuple(self.modules_to_save))

    # ---- Before any heavy work ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise LowraError for settings that cannot work, and for missing or malformed base, lists and images."""
        check_fields(self, "builder")
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("ViT task", task, TASKS, "Choose by builder.tasks=[...].")
        if len(set(self.tasks)) < len(self.tasks):
            raise LowraError(f"builder.tasks is {list(self.tasks)}; expected different tasks.")
        check_trainer_names(("optimiser", self.optimiser), ("schedule", self.schedule))
        if self.precision == "float16" and (self.use_cpu or not torch.cuda.is_available()):
            raise LowraError("builder.precision=float16 needs CUDA; use float32 or bfloat16 on this machine.")
        for head in self.modules_to_save:
            if head != "classifier":  # the one module a task's own classes ask for
                raise unknown("module in builder.modules_to_save", head, ("classifier",))
        if self.miniature is not None:
            if self.base is not None or self.data is not None:
                raise LowraError(
                    "builder.base and builder.data are for builds from a given model and images, and builder.miniature "
                    "makes its own; use source=build, or builder.miniature=null."
                )
            self.miniature.check()
            width = self.miniature.width
        else:
            if self.base is None or self.data is None:
                raise LowraError(
                    "The full-size ViT build needs builder.base (a Hub id or folder) and builder.data=FOLDER, a copy "
                    "of VTAB-1k (FOLDER/<task>/images, train800.txt, val200.txt); or use source=mini."
                )
            check_tasks(Path(self.data), self.tasks)
            width = check_base(component_folder(self.base))
        if not 1 <= self.rank <= width:
            raise LowraError(f"builder.rank is {self.rank}; expected 1 to {width}, the width of the base.")
        self.tuning.check(width)
        if self.shared_a and self.kind not in RANDOM_A:
            raise LowraError(
                f"builder.shared_a freezes a random A, and builder.kind={self.kind} has none; "
                f"it is for {', '.join(RANDOM_A)}."
            )
        if self.shared_among and not self.shared_a:
            raise LowraError("builder.shared_among says how many tasks share an A; it needs builder.shared_a=true.")

    # ---- Building -----------------------------------------------------------------------------------------------

    def build(self, folder: Path) -> Built:
        """Make the subset in `folder`: base/, vtab-1k/, loras/, evaluation/ and dataset/, resuming what is there.

        Base, tasks and evaluation of other kinds than LoRA are those of LoRA's recipe, in the folder beside that one.
        A killed fine-tune goes on from its last epoch. Returns a report of validation losses and accuracies before
        and after each fine-tune, and the size of the updates. Raises LowraError for a mistake in base or data.
        """
        report: dict[str, Any] = {}
        evaluation = None
        home = self._home(folder)
        with quiet():
            if (mini := self.miniature) is not None:
                base, evaluation = home / "base", home / "evaluation"
                report["base"] = stage(base, lambda partial: self._pretrain(mini, partial))
                stage(evaluation, lambda partial: mini.write_evaluation(partial, self.seed))
            else:
                base = component_folder(str(self.base))
            adapters, report["tasks"] = {}, {}
            # The delay keeps quiet about tasks that are all there from an earlier build.
            with tqdm(self.tasks, desc="fine-tuning", unit="task", delay=1, dynamic_ncols=True) as tasks:
                for task in tasks:
                    tasks.set_postfix_str(task, refresh=False)
                    adapters[task] = folder / "loras" / f"{list(TASKS).index(task):02}_{task}"
                    report["tasks"][task] = self._build_lora(base, home, task, adapters[task])
        public_name = self.base or "lowra/vit-miniature"
        # Selections of tasks share a folder, and each has a data set.
        numbers = [list(TASKS).index(task) for task in self.tasks]
        chosen = "" if numbers == list(range(len(TASKS))) else "".join(f"-{number:02}" for number in numbers)
        dataset = folder / f"dataset{chosen}"

        def write(partial: Path) -> dict[str, Any]:
            ratios: dict[str, float] = {}
            layers = lora_layers(base, adapters, pre_ft_name=public_name)
            write_dataset(_measured(layers, ratios), partial / "parquet", dtype=self.dataset_dtype)
            return {"update_to_weight_norm": ratios}

        report |= stage(dataset, write)
        return Built(dataset / "parquet", str(base) if self.base is None else self.base, evaluation, report)

    def _home(self, folder: Path) -> Path:
        """The folder of base and data: LoRA's recipe's, so that models of different kinds have one base."""
        if self.kind == "lora":
            return folder
        plain = dataclasses.replace(self, kind="lora", shared_a=False, shared_among=None)
        return folder.with_name(folder.name.removesuffix(recipe_key(self)) + recipe_key(plain))

    def _pretrain(self, mini: Miniature, folder: Path) -> dict[str, Any]:
        """Train the miniature's base on drawn images and save it as the full-size one is saved."""
        train, held_out = (Images(**data) for data in mini.pretraining_data(self.seed))
        torch.manual_seed(self.seed)
        model = mini.new_model()
        trainer = self._trainer(
            model,
            folder / "trainer",
            train,
            held_out,
            learning_rate=mini.learning_rate,
            per_device_train_batch_size=mini.batch_size,
            num_train_epochs=mini.epochs,
            weight_decay=mini.weight_decay,
            warmup_steps=mini.warmup,
            lr_scheduler_type="cosine",
            eval_strategy="no",
            save_strategy="no",
        )
        with progress(trainer, "pre-training"):
            trainer.train()
        scores = trainer.evaluate()
        model.save_pretrained(folder)
        mini.processor().save_pretrained(folder)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        return {"accuracy": scores["eval_accuracy"], "loss": scores["eval_loss"], "held_out": mini.held_out}

    def _build_lora(self, base: Path, folder: Path, task: str, target: Path) -> dict[str, Any]:
        """One task's adapter, fine-tuned in a stage of its own."""
        if (mini := self.miniature) is not None and not target.exists():
            stage(folder / "vtab-1k" / task, lambda partial: mini.write_task(partial, task, self.seed))
        data = folder / "vtab-1k" if self.data is None else Path(self.data)
        return stage(target, lambda partial: self._fine_tune(base, data / task, task, partial))

    def _fine_tune(self, base: Path, data: Path, task: str, folder: Path) -> dict[str, Any]:
        """Table 5: LoRA on query and value, and the checkpoint of best validation loss."""
        from transformers import ViTForImageClassification, set_seed

        processor = self._processor(base)
        train, val = (Images.read(data, name, processor) for name in (TRAIN_LIST, VAL_LIST))
        classes = int(max(train.labels.max(), val.labels.max())) + 1
        seed = self.seed + 1 + list(TASKS).index(task)
        set_seed(seed)
        # The base's head has other classes than the task: it gets a new one, trained beside the LoRA.
        model = ViTForImageClassification.from_pretrained(base, num_labels=classes, ignore_mismatched_sizes=True)
        before_training = weights_of(model, self.target_modules) if self.kind == "full" else {}
        peft_model = self.tuning.wrap(model)
        if self.shared_a:
            group = list(TASKS).index(task) // self.shared_among if self.shared_among else 0
            freeze_shared_a(peft_model, self.seed + group)
        trainer = self._trainer(
            peft_model,
            folder / "trainer",
            train,
            val,
            learning_rate=self.kinds.of(self.kind).learning_rate or self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            num_train_epochs=self.epochs,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup,
            optim=self.optimiser,
            lr_scheduler_type=self.schedule,
            bf16=self.precision == "bfloat16",
            fp16=self.precision == "float16",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            seed=seed,
        )
        before = trainer.evaluate()
        with progress(trainer, task):
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / "trainer"))
        after = trainer.evaluate()
        if self.kind == "full":
            save_difference(model, before_training, folder, self.modules_to_save)
        else:
            peft_model.save_pretrained(str(folder))
            model = peft_model.merge_and_unload()
        check_changed(base, folder, model, self.modules_to_save)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        return {
            "classes": classes,
            "val_loss_before": before["eval_loss"],
            "val_loss": after["eval_loss"],
            "val_accuracy_before": before["eval_accuracy"],
            "val_accuracy": after["eval_accuracy"],
            "best_epoch": best_epoch(trainer),
        }

    def _processor(self, base: Path) -> Any:
        changes: dict[str, Any] = {"resample": {"bilinear": 2, "bicubic": 3}[self.resample]}  # PIL's numbers
        if self.normalisation == "imagenet":
            changes |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        return image_processor(base, **changes)

    def _trainer(self, model: Any, output: Path, train: Images, val: Images, **settings: Any) -> Any:
        """A silent Trainer: settings as given, nothing reported elsewhere, files only in `output`."""
        from transformers import PrinterCallback, Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(output),
            **{
                "seed": self.seed,
                "per_device_eval_batch_size": 256,
                "use_cpu": self.use_cpu,
                "dataloader_pin_memory": False,
                "label_names": ["labels"],
                "remove_unused_columns": False,
                "report_to": "none",
                "logging_strategy": "no",
                "disable_tqdm": True,
                **settings,
            },
        )
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=val, compute_metrics=accuracy)
        trainer.remove_callback(PrinterCallback)
        return trainer


# ---- Data -------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """Images and labels in memory. pixel_values: (n, 3, height, width) float32; labels: (n,) int64."""

    def __init__(self, pixel_values: Tensor, labels: Tensor) -> None:
        self.pixel_values = pixel_values
        self.labels = labels

    @classmethod
    def read(cls, folder: Path, name: str, processor: Any) -> Images:
        """The images of one list of a task folder."""
        paths, labels = read_list(folder, name)
        return cls(pixel_values(paths, processor), torch.tensor(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def read_list(folder: Path, name: str) -> tuple[list[Path], list[int]]:
    """The images and labels that a list of a VTAB-1k task folder names: lines "images/xxx.png label".

    Raises LowraError for a missing list, a malformed line or a missing image.
    """
    if not (folder / name).exists():
        raise LowraError(f"Task folder {folder} has no {name}; expected the VTAB-1k layout (images/, {name}).")
    paths, labels = [], []
    for number, line in enumerate((folder / name).read_text().splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise LowraError(f'{folder / name}, line {number}, is {line!r}; expected "images/NAME.png LABEL".')
        path = folder / match[1]
        if not path.exists():
            raise LowraError(f"{folder / name}, line {number}, names {match[1]}, which is not in {folder}.")
        paths.append(path)
        labels.append(int(match[2]))
    if not paths:
        raise LowraError(f"{folder / name} lists no images; expected lines like images/000000.png 3.")
    return paths, labels


def freeze_shared_a(model: torch.nn.Module, seed: int) -> None:
    """Give every LoRA A the values `seed` draws for it, in PEFT's own distribution, and freeze them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            parameter.requires_grad_(False)


def check_tasks(data: Path, tasks: Sequence[str]) -> None:
    """Raise LowraError unless every task's folder is there with both lists and their images."""
    for task in tasks:
        if not (data / task).is_dir():
            found = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
            raise LowraError(
                f"There is no folder of task {task!r} in builder.data={data}; found: {', '.join(found) or 'nothing'}."
            )
        for name in (TRAIN_LIST, VAL_LIST):
            read_list(data / task, name)


def check_base(base: Path) -> int:
    """Raise LowraError unless a base folder holds a ViT classifier with weights and processor; returns its width."""
    from transformers import AutoConfig

    StoredState(base)
    if not (base / "config.json").exists():
        raise LowraError(f"{base} has no config.json; expected a model saved by transformers.")
    try:
        config = AutoConfig.from_pretrained(base)
    except Exception as error:  # transformers raises several kinds for a damaged file
        raise LowraError(f"{base / 'config.json'} cannot be read ({_first_line(error)}); fetch it again.") from None
    if config.model_type != "vit":
        raise LowraError(f"{base} holds a model of type {config.model_type!r}; the ViT builder needs 'vit'.")
    image_processor(base)
    return int(config.hidden_size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Training ---------------------------------------------------------------------------------------------------


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of images whose largest logit is the label's."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def best_epoch(trainer: Any) -> float:
    """The epoch whose checkpoint was loaded at the end."""
    steps = trainer.state.best_global_step
    return steps / trainer.state.max_steps * trainer.state.num_train_epochs


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint of a killed Trainer; its state file is written last."""
    states = [*folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(states, key=lambda path: int(path.parent.name.split("-")[1])).parent) if states else None


def check_changed(base: Path, adapter: Path, merged: Any, heads: Sequence[str]) -> None:
    """Raise LowraError unless fine-tuning changed the targeted weights and no others (App. G)."""
    stored = StoredState(base)
    opened = Adapter(adapter)
    names = layer_names(base, opened.modules)
    biases = [f"{names[module].removesuffix('.weight')}.bias" for module in opened.scaled_biases]
    expected = tuple(sorted([*names.values(), *(name for name in biases if name in stored)]))
    state = {name: tensor for name, tensor in checkpoint_state(merged).items() if name.split(".")[0] not in heads}
    changed = changed_weights([{name: stored[name] for name in stored if name.split(".")[0] not in heads}, state])
    if changed != expected:
        wrong = sorted(set(changed) ^ set(expected))
        raise LowraError(f"Fine-tuning should change {len(expected)} weights; {wrong[0]!r} is not as expected.")


def _measured(layers: Iterator[Layer], ratios: dict[str, float]) -> Iterator[Layer]:
    """Pass layers on, and fill in each LoRA's mean over layers of |update| / |weight| (Frobenius norms)."""
    sums: dict[str, list[float]] = {}
    for layer in layers:
        for update in layer.loras:
            sums.setdefault(update.name, []).append(float(update.difference(layer.weight).norm() / layer.weight.norm()))
        yield layer
    ratios |= {name: sum(values) / len(values) for name, values in sums.items()}


@contextlib.contextmanager
def progress(trainer: Any, label: str) -> Iterator[None]:
    """A progress bar over a Trainer's steps, shown when they take over 5 seconds."""
    from transformers import TrainerCallback

    interval = 0.1 if sys.stderr.isatty() else 30  # a log file wants a line now and then, not ten a second
    with tqdm(desc=label, unit="step", delay=5, mininterval=interval, leave=False, dynamic_ncols=True) as bar:

        class Bar(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                bar.total = state.max_steps
                bar.update(state.global_step - bar.n)

        trainer.add_callback(Bar())
        yield
