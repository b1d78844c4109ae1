"""Scripts: whatever they import is there. (What they do takes hours; their parts are tested where they lie.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts_as_modules import SCRIPTS, load_script


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_starts(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    module = load_script(path.stem)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
