from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import planted_layers
from omegaconf import DictConfig

from lowra.bench import sources
from lowra.bench.schema import write_dataset
from lowra.bench.sources import Mini, Source, make_source
from lowra.errors import LowraError

Configure = Callable[..., DictConfig]


def source(configure: Configure, *overrides: str) -> Source:
    return make_source(configure("metrics=[]", *overrides))


@pytest.mark.parametrize(
    ("name", "subset", "weights_only", "miniature", "caption"),
    [
        ("mini", "vit", False, True, "**a miniature built and attacked on one machine, NOT the paper's experiment**"),
        ("build", "mistral_sft", False, False, "LoRAs built at full size by this project's recipes"),
        ("published", "vit", False, False, "the published LoWRA-Bench data"),
        ("published", "custom", True, False, "a data set on disk"),
        ("synthetic", "vit", True, False, "**true layer shapes with generated weights and LoRA updates"),
    ],
)
def test_sources_say_what_they_are(
    name: str, subset: str, weights_only: bool, miniature: bool, caption: str, configure: Configure
) -> None:
    made = source(configure, f"subset={subset}", f"source={name}")
    assert (made.name, made.weights_only, made.miniature) == (name, weights_only, miniature)
    assert made.caption.startswith(caption)


def test_data_on_disk(dataset: Path, configure: Configure) -> None:
    made = source(configure, "subset=custom", "source=published", f"source.path={dataset}")
    made.check()
    data = made.open()
    assert len(data.table) == 3
    assert data.base is None
    known = source(configure, "subset=vit", "source=published", f"source.path={dataset}").open()
    assert known.base == "google/vit-base-patch16-224"


def test_one_configuration_of_a_copy_of_the_published_data(tmp_path: Path, configure: Configure) -> None:
    write_dataset(planted_layers(layers=2), tmp_path / "copy" / "vit")
    write_dataset(planted_layers(layers=3), tmp_path / "copy" / "stable-diffusion-1.5")
    where = f"source.path={tmp_path / 'copy'}"
    assert len(source(configure, "subset=vit", "source=published", where).open().table) == 2
    assert len(source(configure, "subset=stable_diffusion", "source=published", where).open().table) == 3
    with pytest.raises(LowraError, match=r"several folders \(stable-diffusion-1\.5, vit\)"):
        source(configure, "subset=custom", "source=published", where).check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("subset=custom",), "subset=custom is read from disk and cannot come from source=mini: give source=published"),
        (("subset=custom", "source=published"), "is not in the published data set; give source.path=FOLDER"),
        (("source=published", "source.path=5"), "source.path is 5; expected text or null"),
        (("source=published", "source.path=/nowhere/at/all"), "/nowhere/at/all does not exist"),
        (("source=published", "+source.pat=x"), "Unknown setting 'source.pat'; known: source.name, source.path"),
        (("cache_dir=null",), "source.cache_dir is null; expected text"),
        (("source=synthetic", "+source.table.sharedA=true"), "Unknown setting 'source.table.sharedA'; known: "),
        (("source=synthetic", "source.table.n_models=two"), "source.table.n_models is 'two'; expected a whole number"),
        (("source=synthetic", "subset.synthetic.rank=0"), "subset.synthetic.rank is 0; expected a whole number, at"),
        (("source=synthetic", "subset.synthetic=null"), "subset=vit has none"),
        (("subset.kind=classifier",), "subset.kind is 'classifier'; expected one of image_classifier"),
        (("+builder.rang=3",), "Unknown setting 'builder.rang'; known: .*builder.rank"),
        (("builder._target_=torch.load",), "names 'torch.load', which is no dataclass"),
        (("builder._target_=lowra.nothing.X",), "names 'lowra.nothing.X', which cannot be imported"),
        (("builder.rank=${nothing}",), "configuration cannot be resolved"),
        (
            ("source=build", "~builder"),
            r"there is no conf/builder/vit_build\.yaml.*\(custom, mistral_dpo, mistral_sft, ",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_built(
    overrides: tuple[str, ...], message: str, configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(LowraError, match=message):
        source(configure, *overrides).check()
    assert not (tmp_path / "cache").exists()


# ---- A miniature's check ----------------------------------------------------------------------------------------

asked: list[Any] = []


@dataclass(frozen=True)
class Checked:
    """A builder that notes each time it is asked."""

    miniature: Any = "tiny"
    rank: int = 4

    def check(self) -> None:
        asked.append(self)
        if self.rank > 8:
            raise LowraError("too large")


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mini:
    asked.clear()
    monkeypatch.setenv("LOWRA_CACHE", str(tmp_path / "cache"))
    return Mini("mini", {"name": "vit"}, {}, str(tmp_path), "vgg")


def test_a_miniature_that_passed_its_check_is_not_asked_again(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        mini.check_recipe(Checked())  # type: ignore[arg-type]
    assert asked == [Checked()]
    mini.check_recipe(Checked(rank=5))  # type: ignore[arg-type]
    assert asked == [Checked(), Checked(rank=5)]
    for _ in range(2):  # what failed is
        with pytest.raises(LowraError, match="too large"):
            mini.check_recipe(Checked(rank=9))  # type: ignore[arg-type]
    assert len(asked) == 4
    monkeypatch.setattr(sources, "versions", lambda names: {"torch": "99"})
    mini.check_recipe(Checked())  # type: ignore[arg-type]
    monkeypatch.setattr(sources, "code_digest", lambda module: "edited")
    mini.check_recipe(Checked())  # type: ignore[arg-type]
    assert len(asked) == 6


def test_a_recipe_that_reads_from_elsewhere_is_always_asked(mini: Mini) -> None:
    for _ in range(2):
        mini.check_recipe(Checked(miniature=None))  # type: ignore[arg-type]
    assert len(asked) == 2
