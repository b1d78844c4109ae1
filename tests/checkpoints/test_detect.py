import json

import pytest
import torch
from safetensors.torch import save_file

from lowra.checkpoints.detect import changed_weights
from lowra.checkpoints.reading import StoredState
from lowra.errors import LowraError


def state(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    names = ("a.weight", "b.weight", "c.weight")
    return {name: torch.randn(3, 2, generator=generator) for name in names} | changes


def save(folder, tensors, shards=1):
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_finds_what_differs_in_any_model(tmp_path):
    base, third = state(), state()
    nudged = base["b.weight"].clone()
    nudged[1, 1] = torch.nextafter(nudged[1, 1], torch.tensor(9.0))
    second = state(**{"b.weight": nudged})
    third["c.weight"] += 1
    expected = ("b.weight", "c.weight")
    assert changed_weights([base, second, third]) == expected
    assert changed_weights([base, state()]) == ()
    folders = [save(tmp_path / f"m{i}", tensors, shards=i + 1) for i, tensors in enumerate([base, second, third])]
    assert changed_weights(folders) == expected
    assert changed_weights([base, folders[1]]) == ("b.weight",)


def test_stored_state_reads_shards(tmp_path):
    tensors = state()
    stored = StoredState(save(tmp_path / "m", tensors, shards=2))
    assert sorted(stored) == sorted(tensors)
    assert stored.shape("a.weight") == (3, 2)
    assert torch.equal(stored["c.weight"], tensors["c.weight"])


def test_errors(tmp_path):
    with pytest.raises(LowraError, match="at least 2 checkpoints; got 1"):
        changed_weights([state()])
    with pytest.raises(LowraError, match=r"'d\.weight' is in checkpoint 1 and not in checkpoint 0"):
        changed_weights([state(), state(**{"d.weight": torch.zeros(1)})])
    with pytest.raises(LowraError, match=r"'a\.weight' has shape \(3, 2\) in checkpoint 0 and \(2, 2\) in"):
        changed_weights([state(), state(**{"a.weight": torch.zeros(2, 2)})])
    with pytest.raises(LowraError, match="holds no safetensors weights"):
        StoredState(tmp_path)
    folder = save(tmp_path / "m", state(), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    with pytest.raises(LowraError, match="not a readable safetensors file"):
        StoredState(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LowraError, match=r"names model-00002-of-00002\.safetensors, which is not in"):
        StoredState(folder)
