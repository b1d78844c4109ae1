"""Digests of code follow what it imports."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path

import pytest

from lowra.code import closure, code_digest, module_of
from lowra.methods.mean_lora import MeanLora


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of one's own with a helper beside it and a package."""
    (tmp_path / "own_method.py").write_text(
        "import own_helper\nfrom own_pack.inner import g\nimport json\n\ndef f(stack):\n    from lowra import errors\n"
    )
    (tmp_path / "own_helper.py").write_text("X = 1\n")
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").write_text("")
    (tmp_path / "own_pack" / "inner.py").write_text("from . import sibling\ng = 1\n")
    (tmp_path / "own_pack" / "sibling.py").write_text("Y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    code_digest.cache_clear()
    importlib.invalidate_caches()
    return tmp_path


def test_the_closure_holds_what_is_imported_and_nothing_installed(package: Path) -> None:
    found = closure("own_method")
    assert set(found) == {"own_method", "own_helper", "own_pack", "own_pack.inner", "own_pack.sibling", "lowra.errors"}


ANYWHERE = """
class A:
    import m_class
    async def f(self):
        async with self:
            import m_async
        for _ in ():
            while _: import m_loop
            else: import m_else
        match self:
            case A(): import m_case
try:
    if 1: import m_if
    elif 2: import m_elif
except OSError:
    import m_except
else:
    with A(): import m_with
finally:
    import m_finally
"""


def test_imports_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(re.findall(r"import (\w+)", ANYWHERE))
    for name in names:
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "own_anywhere.py").write_text(ANYWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    assert set(closure("own_anywhere")) == {"own_anywhere", *names}


@pytest.mark.parametrize("edited", ["own_method.py", "own_helper.py", "own_pack/sibling.py"])
def test_an_edit_anywhere_in_it_is_another_digest(package: Path, edited: str) -> None:
    before = code_digest("own_method")
    with (package / edited).open("a") as file:
        file.write("Z = 2\n")
    code_digest.cache_clear()
    assert code_digest("own_method") != before


def test_the_exact_method_notices_spectral_detuning() -> None:
    assert "lowra.methods.spectral_detuning" in closure("lowra.methods.subspace_intersection")
    assert "lowra.methods.subspace_intersection" not in closure("lowra.methods.spectral_detuning")


def test_a_part_of_lowra_may_be_all_that_counts(package: Path) -> None:
    builders = code_digest("lowra.builders.vit", within="lowra.builders")
    assert builders != code_digest("lowra.builders.vit")
    assert builders != code_digest("lowra.builders.vit", within="lowra.builders.vit")
    assert code_digest("own_method", within="lowra.builders") != code_digest("own_method")  # without lowra.errors


def test_commands_and_tables_decide_no_number() -> None:
    for name in ("lowra.methods.subspace_intersection", "lowra.bench.merging", "lowra.metrics.weight_error"):
        assert not {"lowra.run", "lowra.pipeline", "lowra.records", "lowra.reporting"} & set(closure(name))


def test_galleries_decide_no_score() -> None:
    """Else an edited picture of pictures would have all of them scored again."""
    for name in ("lowra.metrics.lpips", "lowra.metrics.sbert"):
        found = closure(name)
        assert "lowra.metrics.base" in found
        assert not [module for module in found if module.startswith("lowra.reporting")]


def test_modules_of_objects_functions_and_partials() -> None:
    assert module_of(MeanLora()) == "lowra.methods.mean_lora"
    assert module_of(functools.partial(functools.partial(code_digest.__wrapped__), "x")) == "lowra.code"


def test_code_without_a_file_has_a_digest_of_its_own() -> None:
    assert code_digest("nowhere_to_be_found") == code_digest("nowhere_to_be_found")
    code = "from lowra.code import code_digest; print(code_digest('nowhere_to_be_found'))"
    import subprocess

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other != code_digest("nowhere_to_be_found")
