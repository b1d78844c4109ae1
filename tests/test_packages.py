"""Missing and too old packages are told in one sentence with the command that helps."""

import sys

import pytest

from lowra import packages
from lowra.errors import LowraError
from lowra.packages import require


def test_what_is_there_is_fine() -> None:
    require("This test", "torch", "numpy")


def test_missing_and_old_packages_are_named_with_the_install_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["numpy>=1.26", "tqdm>=9.17; extra == 'builders'", "torch>=99"]
    monkeypatch.setattr(packages, "_declared", lambda: declared)
    monkeypatch.setattr(packages, "_version", {"numpy": "2.0", "tqdm": "9.16.1", "torch": "2.9.0+cpu"}.get)
    monkeypatch.setitem(sys.modules, "absent", None)
    require("This test", "numpy")
    with pytest.raises(LowraError) as caught:
        require("This test", "numpy", "tqdm", "torch", "absent")
    assert str(caught.value) == (
        "This test needs other packages than there are: tqdm is 9.16.1, torch is 2.9.0+cpu, absent is not installed; "
        "pip install 'tqdm>=9.17' 'torch>=99' absent"
    )
