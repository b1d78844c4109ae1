"""The core needs none of the model libraries: a plain `pip install lowra` recovers, records and reports."""

import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = (
    "accelerate",
    "datasets",
    "diffusers",
    "lpips",
    "peft",
    "sentence_transformers",
    "sklearn",
    "torchvision",
    "transformers",
    "trl",
)
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))"
ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    """Everything importable in the package but the builders, which are made of those libraries."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lowra").rglob("*.py"))
    kept = (path for path in files if path.name != "__main__" and path.parts[1] != "builders")
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in kept)


def test_every_module_imports_without_the_model_libraries() -> None:
    """Metrics too: what they need is asked for when it is needed."""
    code = f"{BLOCKED}; import importlib; [importlib.import_module(name) for name in {modules()!r}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_and_a_report_without_the_model_libraries(dataset: Path, tmp_path: Path) -> None:
    code = f"{BLOCKED}; import runpy; runpy.run_module('lowra.run', run_name='__main__')"
    settings = ["subset=custom", "source=published", f"source.path={dataset}", "n_loras=3", "trials=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *settings, f"results_dir={tmp_path / 'results'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Subspace intersection" in done.stdout
    assert (tmp_path / "results" / "custom" / "published" / "table.md").exists()


@pytest.mark.parametrize("metric", ["activation_distance", "lpips", "sbert"])
def test_a_metric_without_its_packages_is_one_sentence_before_any_work(metric: str, tmp_path: Path) -> None:
    subset = {"activation_distance": "vit", "lpips": "stable_diffusion", "sbert": "mistral_sft"}[metric]
    code = f"{BLOCKED}; import runpy; runpy.run_module('lowra.run', run_name='__main__')"
    settings = [f"subset={subset}", f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run([sys.executable, "-c", code, *settings], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pip install" in done.stderr
    assert not (tmp_path / "cache").exists()
