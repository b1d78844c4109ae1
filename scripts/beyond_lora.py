"""Beyond LoRA, and defences: what a defence costs who publishes, and the two pages of results/ about them.

    python scripts/beyond_lora.py price     # on the ViT miniature: results/defences/price.json, a minute on 2 cores
    python scripts/beyond_lora.py frames    # attacks on rotated and scaled releases: results/defences/frames.csv
    python scripts/beyond_lora.py page      # results/kinds/README.md and results/defences/README.md, from records

`price` builds the miniature where it is not there, merges every LoRA into the base in float32, and lets each model
classify its task's validation images before and after each defence. `page` reads the exported records of
`experiment=kinds` and `experiment=defences`, with the builds' reports that they carry, and what `price` wrote. All
numbers of the pages come from there; the sentences, which are opinions on the numbers, stand in `KINDS` and `VERDICTS`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from lowra import records
from lowra.bench.defences import Defence, Place, Rotation, Rounding, Scaling, applied
from lowra.bench.merging import merge
from lowra.bench.sources import make_source
from lowra.files import replacing
from lowra.methods.base import Observation
from lowra.methods.subspace_intersection import SubspaceIntersection
from lowra.metrics.weight_error import weight_error
from lowra.paths import conf_dir, register_resolvers
from lowra.plan import make_defence
from lowra.reporting.numbers import duration, number, pair, share
from lowra.reporting.tables import markdown
from lowra.reporting.views import View, views

RESULTS = Path(__file__).resolve().parent.parent / "results"
PRICE, FRAMES = Path("defences") / "price.json", Path("defences") / "frames.csv"

# The defences that are priced, as the settings of a run name them.
VARIANTS: tuple[tuple[str, ...], ...] = (
    *(("defence=noise", f"defence.size={size}") for size in ("1e-4", "1e-3", "1e-2")),
    ("defence=shared_component",),
    ("defence=rank_padding",),
    *(
        ("defence=rounding", f"defence.format={name}", f"defence.stochastic={stochastic}")
        for name in ("bfloat16", "float8", "int8")
        for stochastic in ("false", "true")
    ),
    ("defence=rotation",),
    ("defence=scaling",),
)

# ---- Sentences --------------------------------------------------------------------------------------------------

KINDS = {
    "lora": "Recovered to the rounding of the merges from three models, and certified: what the models have in "
    "common beside independent updates of low rank is W.",
    "rslora": "LoRA by another scale: recovered like it.",
    "dora": "W' = diag(c) (W + M). The low-rank part is taken off, but every row keeps a scale, of which n models "
    "show only the ratios. Mistral's base is on the grid of bfloat16, which settles them: W comes back bit for bit. "
    "ViT's is float32, and no model has c = 1: W is known up to one scale a row, which the certificate says, and the "
    "norms of the rows as trained are the guess. One plain LoRA among the models would settle the scales, too.",
    "pissa": "All siblings lack the same leading part of W, and what they have in common is W without it. That is "
    "noticed, the part is put back as far as it is known, and nothing is certified.",
    "mica": "B is frozen to the same singular vectors of W in all models: in that column space W stays open "
    "however many models there are. Outside of it every model shows W as it is, so that the mean is the best "
    "answer.",
    "ia3": "W' = diag(c) W. W is known up to one scale a row; the mean of the scales is all that is known of them, so "
    "that the answer is no nearer to W than the mean. A coarse grid (Mistral's) tells a scale up to powers of two, "
    "and these scales move too far for more; a model without them would settle them.",
    "loha": "The product entry by entry of two matrices of rank r has rank r^2 at most: recovered as LoRA is, "
    "while three such updates have room beside each other.",
    "lokr": "Of full rank as it stands, and of rank one, or few, once the blocks of the layer are laid out as "
    "rows: recovered there.",
    "vera": "A and B are drawn from one key and shared by all models, which train diagonals: in the row space of "
    "A W stays open however many models there are, and outside of it every model shows W as it is.",
    "oft": "W' = W R, R orthogonal and block-diagonal. For each block of inputs all merges agree in W_b W_b^T and "
    "determine nothing else of W: not recoverable from merges alone.",
    "full": "Differences of full rank, which nothing tells from W. The mean is the best that is known, and gains "
    "as the differences cancel out.",
}
"""Why each kind of fine-tuning can or cannot be undone, in the order of the page."""

VERDICTS = {
    "none": "",
    "noise": "Holds up to its own size: the updates are taken off all the same, and what is left is the noise, "
    "averaged over the models. Never certified, and decades below the mean; each further model helps whoever "
    "attacks.",
    "shared component": "Holds as far as the component goes: recovered, and certified, is W with it. The "
    "certificate claims W up to what was put into all models alike, and so it is judged here (the floor has the "
    "component in it). Broken by three releases that lack it.",
    "rank padding": "Broken by the same three models: the padding is one more update of low rank and goes with "
    "it. (The floor leaves it in.)",
    "rounding": "Holds up to the step of the format, averaged over the models, like noise; here the base is finer "
    "than the format. It costs next to no accuracy and saves bytes. Never certified.",
    "rotation": "Holds against an attack that does not know it: differences have full rank, nothing is certified, "
    "and even the mean is farther from W than an undefended model. Broken by one that does "
    "(methods.subspace_intersection.heads=3): W up to one rotation a head, in the frame of the first release, "
    "where it goes with that release's own keys and output projection. Against W itself, as here, that does not "
    "show. The function stays, to the rounding.",
    "scaling": "Broken up to one scale a row: the scales' ratios are found, the updates taken off, and that is "
    "what is certified; the numbers here, against W itself, are the scales left. In one release's own scales W "
    "goes with that release's keys and output projection.",
    "frozen A for all": "Holds however many models there are, in the row space of A; outside of it every model "
    "shows W as it is. Training B alone costs more accuracy than anything else here.",
    "frozen A by pairs": "Costs the same, and is broken by models of three pairs, or by four of two: their row "
    "spaces differ. Where two models share an A the answer gets no certificate, though it is right. Only two of "
    "one pair and one other leave W open, in the row space of the two; one of the two draws of three models is so, "
    "which is what makes their mean.",
    "MiCA": "Holds in the column space of B; outside of it every model shows W as it is.",
    "VeRA": "Holds in the row space of A; outside of it every model shows W as it is.",
    "PiSSA": "Holds as far as the part that all models lack cannot be put back; no certificate is fooled.",
}
"""What each defence is worth (holds, holds up to, broken by), in the order of the page."""

# Defences that are a way of training, and the folders under results/ that their records are in.
TRAINED = {
    "frozen A for all": ("defended_all", "defended"),
    "frozen A by pairs": ("defended_pairs",),
    "MiCA": ("kinds/mica",),
    "VeRA": ("kinds/vera",),
    "PiSSA": ("kinds/pissa",),
}

# ---- The price --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """What a defence costs on validation images, over all tasks.

    label: the defence as records name it. accuracy_before, accuracy_after: means over tasks. largest_logit_difference:
    of any image and class, absolute. equal_predictions: share of images. bytes_per_weight: of the layers defended.
    """

    label: str
    accuracy_before: float
    accuracy_after: float
    largest_logit_difference: float
    equal_predictions: float
    bytes_per_weight: float


def composed(*settings: str) -> DictConfig:
    """The configuration of a run with these settings."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(settings))


@dataclass(frozen=True)
class FineTune:
    """A merged model of one task, with the task's validation images.

    model: transformers', in memory. state: its tensors float32 by the checkpoint's names. memory: the checkpoint's
    names to those in memory. fine_tuned: names of the weights that its LoRA changed. images: (m, 3, height, width)
    float32. labels: (m,) int64.
    """

    model: Any
    state: dict[str, Tensor]
    memory: dict[str, str]
    fine_tuned: tuple[str, ...]
    images: Tensor
    labels: Tensor

    @torch.no_grad()
    def logits(self, state: Mapping[str, Tensor]) -> Tensor:
        """The model's logits (m, classes) of the images, with the weights of a state."""
        self.model.load_state_dict({self.memory[name]: tensor for name, tensor in state.items()})
        return torch.cat([self.model(part).logits for part in self.images.split(100)])


def fine_tunes(cfg: DictConfig) -> Iterator[FineTune]:
    """The fine-tunes of the ViT miniature, task by task in the order of the data set; what is missing is built."""
    from peft import PeftModel
    from transformers import ViTForImageClassification

    from lowra.builders.peft_adapters import Adapter, checkpoint_names, checkpoint_state, layer_names
    from lowra.builders.vit import VAL_LIST, Images
    from lowra.builders.vit_pictures import TASKS
    from lowra.quiet import quiet

    source = make_source(cfg)
    builder = source.make_builder()
    folder, built = source.folder(builder), source.build()
    processor = builder._processor(Path(built.base))
    for task in builder.tasks:
        adapter = folder / "loras" / f"{list(TASKS).index(task):02}_{task}"
        val = Images.read(folder / "vtab-1k" / task, VAL_LIST, processor)
        classes = built.report["tasks"][task]["classes"]
        with quiet():
            plain = ViTForImageClassification.from_pretrained(
                built.base, num_labels=classes, ignore_mismatched_sizes=True
            )
            model = PeftModel.from_pretrained(plain, adapter).merge_and_unload().float().eval()
        names = layer_names(Path(built.base), Adapter(adapter).modules)
        memory = {stored: name for name, stored in checkpoint_names(model).items()}
        # Copies: the model's own tensors are written over by `logits`.
        state = {name: tensor.clone() for name, tensor in checkpoint_state(model).items()}
        yield FineTune(model, state, memory, tuple(names.values()), val.pixel_values, val.labels)


def published(
    state: Mapping[str, Tensor], fine_tuned: Sequence[str], defence: Defence, model: int, seed: int
) -> dict[str, Tensor]:
    """A fine-tune's weights as a defence publishes them.

    The layers fine-tuned are what a run attacks. Where the rest of an attention is changed along with them, so that the
    model computes what it did, that is done here. state: by names of a ViT's checkpoint. model: its number.
    """
    out = dict(state)
    for name in fine_tuned:
        out[name] = defence.release(state[name], Place(name, model, seed))
    if not isinstance(defence, Rotation | Scaling):
        return out
    ending = "attention.attention.value.weight"
    for value in (name for name in state if name.endswith(ending)):
        block = value.removesuffix(ending)
        for part in ("query", "key", "value"):
            name = f"{block}attention.attention.{part}"
            place = Place(f"{name}.weight", model, seed)
            out[f"{name}.weight"] = defence.release(state[f"{name}.weight"], place)
            out[f"{name}.bias"] = defence.bias(state[f"{name}.bias"], place)
        output = f"{block}attention.output.dense.weight"
        out[output] = defence.partner(state[output], Place(value, model, seed))
    return out


def bytes_per_weight(defence: Defence, k: int) -> float:
    """What a weight of a row of k takes on disk, with its share of the row's scale."""
    if not isinstance(defence, Rounding):
        return 4.0
    return 2.0 if defence.format == "bfloat16" else 1 + 4 / k


def price(settings: Sequence[str], to: Path) -> list[Price]:
    """Measure every defence of `VARIANTS` on all fine-tunes, and write `to`. settings: as for `lowra.run`."""
    cfg = composed(*settings, "subset=vit", "source=mini")
    defences: dict[str, Defence] = {}
    for variant in VARIANTS:
        defence, label = make_defence(composed(*settings, *variant))
        assert defence is not None
        defences[label] = defence
    rows: dict[str, list[tuple[float, float, float, float]]] = {label: [] for label in defences}
    images, width, tasks = 0, 0, 0
    for number_, tune in enumerate(fine_tunes(cfg)):
        before = tune.logits(tune.state)
        right = float((before.argmax(1) == tune.labels).double().mean())
        images, tasks = images + len(tune.labels), tasks + 1
        width = tune.state[tune.fine_tuned[0]].shape[1]
        for label, defence in defences.items():
            after = tune.logits(published(tune.state, tune.fine_tuned, defence, number_, int(cfg.seed)))
            rows[label].append(
                (
                    right,
                    float((after.argmax(1) == tune.labels).double().mean()),
                    float((after - before).abs().max()),
                    float((after.argmax(1) == before.argmax(1)).double().mean()),
                )
            )
    found = []
    for label, measured in rows.items():
        table = torch.tensor(measured, dtype=torch.float64)  # (tasks, 4)
        before_, after_, _, equal = map(float, table.mean(0))  # every task has as many images
        size = bytes_per_weight(defences[label], width)
        found.append(Price(label, before_, after_, float(table[:, 2].max()), equal, size))
    about = {"subset": "vit", "source": "mini", "tasks": tasks, "images": images, "seed": int(cfg.seed)}
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        temporary.write_text(json.dumps(about | {"prices": [asdict(each) for each in found]}, indent=1) + "\n")
    return found


# ---- In a release's own frame ----------------------------------------------------------------------------------


def frames(settings: Sequence[str], to: Path, sizes: Sequence[int] = (3, 5)) -> list[dict[str, Any]]:
    """How near W comes in the frame of the first release, where the function is left alone, and write `to`.

    Rotated or scaled releases show W up to the rotation (scales) of one of them, in which it goes with the keys and the
    output projection of that release. So it is compared with W rotated as the first release is, or with its rows scaled
    as fits best. The first n models of the ViT miniature, each layer; settings: as for `lowra.run`.
    """
    cfg = composed(*settings, "subset=vit", "source=mini")
    table = make_source(cfg).open().table
    heads = int(cfg.builder.miniature.heads)
    scaling, _ = make_defence(composed(*settings, "defence=scaling"))
    assert scaling is not None
    attacked: list[tuple[Defence, SubspaceIntersection]] = [
        (Rotation(heads), SubspaceIntersection(heads=heads)),
        (scaling, SubspaceIntersection()),
    ]
    rows: list[dict[str, Any]] = []
    for defence, method in attacked:
        for n in sizes:
            errors, certificates = [], []
            for index, info in enumerate(table.infos):
                layer = table.read(index, range(n))
                released = applied(defence, merge(layer), info.label, tuple(range(n)), int(cfg.seed))
                recovery = method.recover(Observation(released))
                found, weight = recovery.candidates[0].double(), layer.weight.double()
                if isinstance(defence, Rotation):
                    weight = defence.release(layer.weight, Place(info.label, 0, int(cfg.seed))).double()
                else:
                    found = found * ((found * weight).sum(1) / found.square().sum(1))[:, None]
                errors.append(weight_error(found, weight))
                certificates.append(str(recovery.stats["certificate"]))
            rows.append(
                {
                    "defence": type(defence).__name__.lower(),
                    "n": n,
                    "W-Error in its frame": sum(errors) / len(errors),
                    "worst layer": max(errors),
                    "certificates": ", ".join(f"{certificates.count(c)} {c}" for c in sorted(set(certificates))),
                }
            )
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.4f")
    return rows


# ---- The pages --------------------------------------------------------------------------------------------------

COLUMNS = (
    "Of miniatures, small models trained and attacked on one machine; the rank is not given. W-Error is the mean "
    "over layers of log10 of the mean squared error, ± over draws: the lower, the more is given away. Mean: the "
    "average of the models. Floor: what is left when every fine-tune's own update is known, taken off, and the "
    "rest averaged; rounding to a grid can go below. Certificates: how many layers, over draws, got which of "
    "subspace intersection's; wrong: how many of those certified miss the prediction, or the floor, by more than a "
    "decade."
)


def view_of(folder: Path) -> list[View]:
    """The views of a folder of records, a setting each; [] where there is none."""
    return views(records.read([folder])) if (folder / "records").is_dir() else []


def accuracies(view: View) -> tuple[float, float]:
    """The validation accuracy of a view's models before and after fine-tuning, means over tasks; from its build."""
    tasks = list(view.context["build"]["tasks"].values())
    before, after = (sum(task[key] for task in tasks) / len(tasks) for key in ("val_accuracy_before", "val_accuracy"))
    return before, after


def quality(view: View) -> dict[str, str]:
    """What fine-tuning reached, and how far it went, by the build's report: accuracies of ViT, losses of Mistral."""
    build = view.context["build"]
    if "tasks" in build:
        before, after = accuracies(view)
        sizes = list(build["update_to_weight_norm"].values())
        return {"accuracy": f"{before:.3f} to {after:.3f}", "update": f"{sum(sizes) / len(sizes):.3f}"}
    return {"loss": f"{build['sft']['before']['loss']:.3f} to {build['sft']['after']['loss']:.3f}"}


def certificates(view: View, row: str, n: int) -> str:
    """How many layers, over draws, got each certificate: "20 certified, 4 weak"."""
    layers = view.layers[(view.layers["row"] == row) & (view.layers["n_loras"] == n)]
    counts = layers["stat_certificate"].value_counts()
    return ", ".join(f"{many} {str(code).replace('_', ' ')}" for code, many in counts.items())


def attacks(view: View) -> list[str]:
    """The rows of subspace intersection, as shipped or with options for a defence."""
    return [row for row in view.rows if view.method(row) == "subspace_intersection"]


def measured(view: View, row: str, n: int) -> dict[str, str]:
    """The cells of one attack with n models, beside the mean of the models."""
    at_n = view.numbers[view.numbers["n_loras"] == n].set_index("label")
    mine, mean = at_n.loc[row], at_n["w_error"][at_n["method"] == "mean_lora"].mean()
    return {
        "draws": str(mine["draws"]),
        "mean": number(mean),
        "subspace intersection": pair(mine["w_error"], mine["w_error_std"]),
        "floor": number(mine["floor_w_error"]),
        "exact weights": share(mine["exact_fraction"]),
        "certificates": certificates(view, row, n),
        "wrong": str(int(mine["wrong_certificates"])),
        "time/layer": duration(mine["seconds_per_layer"]),
    }


def kinds_table(results: Path, subset: str) -> list[str]:
    """The lines of one subset's table, and which kinds it lacks."""
    rows, missing = [], []
    for kind in KINDS:
        found = view_of(results / "kinds" / kind / subset / "mini")
        if not found:
            missing.append(kind)
        for view in found:
            table = view.numbers
            for row in attacks(view):
                for n in sorted(set(table["n_loras"][table["label"] == row])):
                    one = table["w_error"][(table["n_loras"] == n) & (table["method"] == "lora_ft")]
                    cells = measured(view, row, n)
                    rows.append(
                        {"kind": kind if view.is_plain(row) else f"{kind}, {row}", "n": str(n)}
                        | {"draws": cells.pop("draws")}
                        | quality(view)
                        | {"one model": number(one.mean())}
                        | cells
                    )
    lines = [markdown(pd.DataFrame(rows)), ""] if rows else []
    return lines + ([f"Not run yet: {', '.join(missing)}.", ""] if missing else [])


def kinds_page(results: Path) -> str:
    """The page of kinds of fine-tuning."""
    lines = [
        "# Kinds of fine-tuning",
        "",
        "What models fine-tuned in each way give away of their base: `python -m lowra.run experiment=kinds "
        f"builder.kind={','.join(KINDS)} -m`, `experiment=kinds_sft` for Mistral; the page is `python "
        "scripts/beyond_lora.py page`.",
        f"{COLUMNS} Accuracy: of the models on their tasks' validation images, before fine-tuning (with a new head) "
        "and after, means over tasks; loss likewise. Update: |W' - W| / |W|, mean over layers and models. One model: "
        "W' in place of W.",
        "",
        "## ViT, float32 base",
        "",
        *kinds_table(results, "vit"),
        "## Mistral SFT, bfloat16 base",
        "",
        *kinds_table(results, "mistral_sft"),
        "## Why",
        "",
        *[f"- **{kind}.** {sentence}" for kind, sentence in KINDS.items()],
    ]
    return "\n".join(lines) + "\n"


def defence_of(view: View) -> str:
    """The defence of a view with its options, as `price` names it; "none"."""
    plain, _, label = str(view.setting["merge_order"]).partition("once, ")
    return label if not plain and label else "none"


def name_of(label: str) -> str:
    """A defence's name without its options."""
    return label.partition(" (")[0]


def accuracy_cell(before: float | None, after: float) -> str:
    """The accuracy under a defence, with the change where it is known."""
    return f"{after:.4f}" if before is None else f"{after:.4f} ({after - before:+.4f})"


def price_cells(priced: Mapping[str, Any] | None) -> dict[str, str]:
    """The columns of a price; empty where nothing was measured."""
    if priced is None:
        return dict.fromkeys(("accuracy", "equal predictions", "logits differ by", "bytes/weight"), "")
    return {
        "accuracy": accuracy_cell(priced["accuracy_before"], priced["accuracy_after"]),
        "equal predictions": share(priced["equal_predictions"]),
        "logits differ by": f"{priced['largest_logit_difference']:.1e}",
        "bytes/weight": f"{priced['bytes_per_weight']:.3g}",
    }


def framed(path: Path) -> list[str]:
    """The table of `frames`, where there is one."""
    if not path.exists():
        return []
    return [
        "Rotated and scaled releases leave W open up to the rotation or the scales of one of them, in which the "
        "model's function is what it was. W-Error against W in that frame (`python scripts/beyond_lora.py frames`):",
        "",
        markdown(pd.read_csv(path, dtype=str)),
        "",
    ]


def defences_page(results: Path) -> str:
    """The page of defences."""
    path = results / PRICE
    prices = {each["label"]: each for each in json.loads(path.read_text())["prices"]} if path.exists() else {}
    found: list[tuple[str, View, dict[str, str]]] = []
    place = list(VERDICTS)
    order = {label: i for i, label in enumerate(prices)}
    weights = view_of(results / "defences" / "vit" / "mini")
    lora = view_of(results / "kinds" / "lora" / "vit" / "mini")

    def rank(view: View) -> tuple[int, int]:
        """As VERDICTS lists defences, and options as `price` tried them; others last."""
        name = name_of(defence_of(view))
        return place.index(name) if name in place else len(place), order.get(defence_of(view), len(order))

    weights.sort(key=rank)
    for view in weights:
        label = defence_of(view)
        cells = price_cells(prices.get(label))
        if label == "none":
            cells |= {"accuracy": accuracy_cell(None, accuracies(view)[1]), "bytes/weight": "4"}
        found.append((label, view, cells))
    for label, folders in TRAINED.items():
        view = next((v for folder in folders for v in view_of(results / folder / "vit" / "mini")), None)
        if view is None:
            continue
        # Beside plain LoRA on the same tasks.
        plain = next((v for v in [*weights, *lora] if same(v, view)), None)
        accuracy = accuracy_cell(None if plain is None else accuracies(plain)[1], accuracies(view)[1])
        found.append((label, view, price_cells(None) | {"accuracy": accuracy}))
    rows = []
    for label, view, cells in found:
        for row in attacks(view):
            plain_row = view.is_plain(row)
            for i, n in enumerate(sorted(set(view.numbers["n_loras"][view.numbers["label"] == row]))):
                numbers_ = measured(view, row, n)
                del numbers_["draws"], numbers_["exact weights"], numbers_["time/layer"]
                rows.append(
                    {"defence": label if plain_row else f"{label}, attacked by {row}", "n": str(n)}
                    | numbers_
                    | (cells if i == 0 and plain_row else price_cells(None))  # a price has no n
                )
    there = {name_of(label) for label, _, _ in found}
    missing = [name for name in VERDICTS if name not in there]
    lines = [
        "# Defences",
        "",
        "What is still recovered from models whose publishers defend themselves, and what that costs them. Defences "
        "done to the weights are files of `conf/defence`: `python -m lowra.run experiment=defences "
        "defence=none,noise,shared_component,rank_padding,rounding,rotation,scaling -m`, options as "
        "`defence.size=1e-2`. Those that are a way of training are `builder.shared_a=true`, with "
        "`builder.shared_among=2` for pairs, and `builder.kind` (see [kinds](../kinds/README.md)). Prices are from "
        "`python scripts/beyond_lora.py price`, the page is `python scripts/beyond_lora.py page`.",
        COLUMNS,
        "",
        "Price, in the first row of each: mean validation accuracy of the fine-tunes (in brackets: against none), the "
        "share of images classified as without the defence, the largest change of any logit, and what a weight takes "
        "on disk. Ways of training stand beside plain LoRA on the same tasks.",
        "",
        markdown(pd.DataFrame(rows)),
        "",
        *([f"Not run yet: {', '.join(missing)}.", ""] if missing else []),
        *framed(results / FRAMES),
        *[f"- **{name[0].upper()}{name[1:]}.** {sentence}" for name, sentence in VERDICTS.items() if name != "none"],
    ]
    return "\n".join(lines) + "\n"


def same(plain: View, other: View) -> bool:
    """Whether a view is of undefended LoRAs trained on another view's tasks."""
    undefended = plain.kind_of_tuning == "lora" and defence_of(plain) == "none"
    return undefended and plain.context["models"] == other.context["models"]


def page(results: Path) -> None:
    """Write both pages."""
    for folder, make in (("kinds", kinds_page), ("defences", defences_page)):
        with replacing(results / folder / "README.md") as temporary:
            temporary.write_text(make(results), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pricing = commands.add_parser("price", help="measure what each defence costs")
    pricing.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings of lowra.run, such as cache_dir=..."
    )
    pricing.add_argument("--to", type=Path, default=RESULTS / PRICE, metavar="FILE")
    framing = commands.add_parser("frames", help="judge attacks on rotated and scaled releases in a release's frame")
    framing.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="settings of lowra.run, such as cache_dir=..."
    )
    framing.add_argument("--to", type=Path, default=RESULTS / FRAMES, metavar="FILE")
    paging = commands.add_parser("page", help="write the pages")
    paging.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the records lie")
    arguments = parser.parse_args()
    if arguments.command == "price":
        print(pd.DataFrame(map(asdict, price(arguments.settings, arguments.to))).to_string(index=False))
    elif arguments.command == "frames":
        print(pd.DataFrame(frames(arguments.settings, arguments.to)).to_string(index=False))
    else:
        page(arguments.results)


if __name__ == "__main__":
    main()
