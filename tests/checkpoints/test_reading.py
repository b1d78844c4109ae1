from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted_checkpoints import three
from safetensors.torch import save_file

from lowra.checkpoints.matching import match
from lowra.checkpoints.reading import (
    StoredState,
    component_folder,
    load_state_dict,
    open_checkpoint,
    resolve,
    with_weights,
)
from lowra.errors import LowraError


def test_sharded_and_bin_checkpoints_are_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2), "b.weight": torch.randn(2, 2)}
    for folder in ("sharded", "bin"):
        (tmp_path / folder).mkdir()
    for i, (name, tensor) in enumerate(state.items()):
        save_file({name: tensor}, tmp_path / "sharded" / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(state)}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("sharded", "bin"):
        found = load_state_dict(tmp_path / folder)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled foreign code')",))


def test_foreign_pickles_are_not_run(tmp_path: Path) -> None:
    torch.save({"a": _Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_state_dict(tmp_path)


def test_published_names_are_found() -> None:
    state = {"encoder.layers.0.mlp.fc1.weight": torch.zeros(1), "x.weight": torch.zeros(1)}
    assert resolve("text_model.encoder.layers.0.mlp.fc1.weight", state) == "encoder.layers.0.mlp.fc1.weight"
    assert resolve("x", state) == "x.weight"
    assert resolve("encoder.x", {"text_model.encoder.x.weight": torch.zeros(1)}) == "text_model.encoder.x.weight"
    with pytest.raises(LowraError, match="has no layer 'y'; it holds 2 others"):
        resolve("y", state)


def test_weights_go_in_with_the_checkpoints_shape_and_dtype() -> None:
    conv = torch.zeros(4, 3, 1, 1, dtype=torch.bfloat16)
    state = {"proj_in.weight": conv, "other.weight": torch.ones(2)}
    weight = torch.randn(4, 3)
    result = with_weights(state, {"proj_in.weight": weight})
    assert result["proj_in.weight"].shape == conv.shape
    assert torch.equal(result["proj_in.weight"].flatten(1), weight.bfloat16())
    assert torch.equal(conv, torch.zeros_like(conv))  # the base stays as it was
    wide = with_weights(state, {"proj_in.weight": weight}, torch.float32)
    assert torch.equal(wide["proj_in.weight"].flatten(1), weight)
    with pytest.raises(LowraError, match=r"has shape \(3, 4\); the checkpoint's is \(4, 3, 1, 1\)"):
        with_weights(state, {"proj_in.weight": weight.T})


def test_missing_base() -> None:
    with pytest.raises(LowraError, match="is not a local folder and cannot be had from the Hub"):
        component_folder("nobody/nothing")


def test_missing_component_and_weights(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match="has no component 'unet'"):
        component_folder(tmp_path, "unet")
    with pytest.raises(LowraError, match="holds no safetensors weights; expected model"):
        load_state_dict(tmp_path)


def test_models_are_matched_without_reading_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [open_checkpoint(folder) for folder in three(tmp_path)]
    monkeypatch.setattr(StoredState, "read", lambda *arguments: pytest.fail("a tensor was read"))
    assert "lm_head.weight" in models[0].components[""]
    assert "head.weight" not in models[0].components[""]
    assert all(None not in tensor.names for tensor in match(models).tensors)
