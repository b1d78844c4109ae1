"""What pyproject.toml asks for, what the lock holds, and what the README installs fit together."""

import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from scripts_as_modules import load_script

from lowra.packages import BUILDERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    return load_script("check_versions")


def locked() -> dict[str, str]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_direct_dependency_is_locked_within_its_range(script: ModuleType) -> None:
    versions = locked()
    for line in [*script.requirements(), *script.requirements("dev")]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[wanted.name]), line
    # A cap keeps pip from the next release for no reason known today; a "+cpu" build is on no index.
    assert not [line for line in script.requirements() if "<" in line or "==" in line]
    assert not [version for version in versions.values() if "+" in version]


def test_floors_are_the_ranges_lower_ends(script: ModuleType) -> None:
    assert script.floors(["torch>=2.6", "hydra-core>=1.3.2"]) == {"hydra-core": "1.3.2", "torch": "2.6"}
    assert {"torch", "numpy", "pandas"} <= script.floors(script.requirements()).keys()
    assert {"peft", "submitit", "lpips"} <= script.floors(script.requirements("dev")).keys()


def test_an_extra_that_repeats_a_requirement_repeats_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges: dict[str, set[str]] = {}
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for line in lines:
            requirement = Requirement(line)
            if requirement.name != "lowra":
                ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in ranges.items() if len(found) > 1} == {}


def test_the_extra_for_builders_is_what_they_are_checked_for() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["builders"]
    assert tuple(Requirement(line).name for line in extra) == BUILDERS


def test_readme_installs_what_was_tested() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("pip install -q -c .ci/constraints.txt -e '.[dev]'" in line for line in commands)


def test_an_outcome_replaces_its_own_section_only(script: ModuleType, tmp_path: Path) -> None:
    script.OUTCOME = tmp_path / "versions.md"
    versions = {"torch": "1.0", "numpy": "2.0"}
    script.write_outcome("newest", True, "5 passed", versions)
    script.write_outcome("lowest", False, "1 failed, 4 passed", versions)
    script.write_outcome("lowest", True, "4 passed, 1 skipped", versions)
    text = script.OUTCOME.read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Versions the tests were run with",
        "## lowest",
        "## newest",
    ]
    assert "**passed** (4 passed, 1 skipped)" in text
    assert "**passed** (5 passed)" in text
    assert "FAILED" not in text
    assert "numpy 2.0, torch 1.0" in text
