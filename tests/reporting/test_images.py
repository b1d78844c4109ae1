"""Grids of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from lowra.errors import LowraError
from lowra.reporting.images import write_grid


@pytest.fixture
def artifacts(tmp_path):
    """Two pictures of each of two models, in plain colours."""
    for label, colour in (("reference", (255, 0, 0)), ("L05/mean_lora", (0, 0, 255))):
        folder = tmp_path / "outputs" / label
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), colour).save(folder / f"{i:03d}.png")
    return tmp_path / "outputs"


def test_grid_shows_every_model_in_order(artifacts, tmp_path):
    (artifacts / "prompts.json").write_text(json.dumps(["a red circle", "a blue square"]))
    out = write_grid(artifacts, ["reference", "L05/mean_lora"], tmp_path / "figures" / "grid.png", "Two models", 5)
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    red = (pixels == (255, 0, 0)).all(-1)
    blue = (pixels == (0, 0, 255)).all(-1)
    assert red.sum() > 1000
    assert blue.sum() > 1000
    assert np.nonzero(red)[1].max() < np.nonzero(blue)[1].min()  # columns in the order of the labels
    assert not list(out.parent.glob("*.partial"))


def test_equal_pictures_give_equal_files(artifacts, tmp_path):
    one, other = (
        write_grid(artifacts, ["reference"], tmp_path / f"{name}.png", "One", 1, headings=["Pre-FT"]) for name in "ab"
    )
    assert one.read_bytes() == other.read_bytes()


def test_missing_pictures(artifacts, tmp_path):
    with pytest.raises(LowraError, match=r"no pictures of 'lora_ft'.*keep_outputs=true"):
        write_grid(artifacts, ["reference", "lora_ft"], tmp_path / "grid.png", "Two models", 2)
