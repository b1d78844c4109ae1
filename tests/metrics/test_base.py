"""What metrics share: settings told apart by what decides scores, files written whole, nothing heavy imported early."""

import dataclasses
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_class

from lowra.files import replacing
from lowra.metrics.base import digest, write_json
from lowra.paths import conf_dir

CONFIGS = sorted((conf_dir() / "metrics").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_metric_names_the_kinds_of_model_it_scores_and_its_places(path: Path) -> None:
    metric = get_class(yaml.safe_load(path.read_text())["_target_"])
    assert set(metric.kinds) <= {"image_classifier", "causal_lm", "text_to_image"}
    assert metric.kinds
    assert set(metric.places) <= {field.name for field in dataclasses.fields(metric)}


def test_importing_the_metrics_loads_no_model_library() -> None:
    heavy = ("transformers", "diffusers", "lpips", "sentence_transformers", "torchvision", "matplotlib", "datasets")
    modules = ", ".join(f"lowra.metrics.{path.stem}" for path in CONFIGS)
    code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = "import sys, lowra.metrics.base; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_digests_depend_on_everything_and_its_order() -> None:
    assert digest("a", ["b"]) == digest("a", ["b"])
    assert len({digest(), digest("ab"), digest("a", "b"), digest(["a"], "b"), digest("b", "a")}) == 5


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "texts.json"
    write_json(path, ["é"])
    assert path.read_text(encoding="utf-8") == '[\n "é"\n]\n'

    def fails() -> None:
        with replacing(path) as temporary:
            assert temporary.suffix == ".json"
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fails()
    assert path.read_text(encoding="utf-8") == '[\n "é"\n]\n'
    assert list(path.parent.iterdir()) == [path]


def _write_often(path: Path, letter: str) -> None:
    for _ in range(200):
        write_json(path, letter * 50_000)


def test_two_processes_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {f'"{letter * 50_000}"\n' for letter in "ab"}
    assert seen
    assert list(tmp_path.iterdir()) == [path]
