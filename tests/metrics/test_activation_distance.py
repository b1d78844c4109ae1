"""Act.-Dist. against a second computation, on a tiny base with the published checkpoint names."""

import dataclasses
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from lowra.checkpoints.reading import with_weights
from lowra.errors import LowraError
from lowra.metrics.activation_distance import cosine_distance, load_vit
from lowra.paths import conf_dir

CPU = torch.device("cpu")
QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


def metric(**changes):
    made = instantiate(OmegaConf.load(conf_dir() / "metrics" / "activation_distance.yaml"), _convert_="object")
    return dataclasses.replace(made, **{"images_per_class": 2, "batch_size": 3, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=4,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("n02", "n01"):
        (folder / label).mkdir()
        for i in range(3):
            image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            image.save(folder / label / f"{i}.JPEG")
    return folder


def nudged(base, size=0.05):
    weight = load_file(base / "model.safetensors")[QUERY]
    return {("", QUERY): weight + size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))}


def reference_distances(base, weights, paths, flatten):
    """Act.-Dist. again, by the library's own folder loading, forward hooks and cosine."""
    values = []
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    pixels = processor(images=[Image.open(p).convert("RGB") for p in paths], return_tensors="pt")["pixel_values"]
    for folder in (base, weights):
        model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
        seen: list[torch.Tensor] = []
        for layer in model.vit.layers:
            layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(pixels)
        values.append([(s.flatten(1) if flatten else s.mean(1)).double() for s in seen])
    return [float(1 - torch.nn.functional.cosine_similarity(a, b).mean()) for a, b in zip(*values, strict=True)]


@pytest.mark.parametrize("tokens", ["mean", "flatten"])
def test_equals_a_second_computation(base, images, tmp_path, tokens):
    made = metric(tokens=tokens, blocks="all")
    scores = made.scorer(str(base), images, CPU, tmp_path / "out").score(nudged(base), "x")
    # The recovered model as a folder in the checkpoint's own names, loaded by transformers.
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(base / "model.safetensors")
    save_file(with_weights(state, {QUERY: nudged(base)["", QUERY]}), tmp_path / "model.safetensors", {"format": "pt"})
    paths = made.image_paths(images)
    expected = reference_distances(base, tmp_path, paths, tokens == "flatten")
    assert scores["act_dist"] == scores["act_dist_block_02"]
    assert scores["act_dist"] > 1e-6
    # The first block lies before the changed layer.
    assert scores["act_dist_block_00"] == 0
    for i, value in enumerate(expected):
        assert scores[f"act_dist_block_{i:02}"] == pytest.approx(value, rel=1e-5, abs=1e-12)
    assert (tmp_path / "out" / "activation_distance_images.txt").read_text().split() == [
        "n01/0.JPEG",
        "n01/1.JPEG",
        "n02/0.JPEG",
        "n02/1.JPEG",
    ]


def test_equal_weights_are_at_distance_zero_and_near_ones_near(base, images):
    scorer = metric().scorer(str(base), images, CPU, None)
    true = load_file(base / "model.safetensors")[QUERY]
    assert scorer.score({("", QUERY): true.clone()}, "x") == {"act_dist": 0.0}
    # A published name may lack `.weight`.
    assert scorer.score({("", QUERY.removesuffix(".weight")): true.clone()}, "x") == {"act_dist": 0.0}
    distances = [scorer.score(nudged(base, size), "x")["act_dist"] for size in (1e-3, 1e-2, 1e-1)]
    assert 0 < distances[0] < distances[1] < distances[2]
    # One model holds them all in turn: nothing of one is left in the next.
    key = "vit.encoder.layer.0.attention.attention.key.weight"
    other = {("", key): load_file(base / "model.safetensors")[key] + 0.1}
    fresh = metric().scorer(str(base), images, CPU, None)
    assert scorer.score(other, "x") == fresh.score(other, "x")
    assert scorer.score(nudged(base, 1e-3), "x")["act_dist"] == distances[0]
    assert scorer.score({}, "x") == {"act_dist": 0.0}


def test_cosine_distance_resolves_below_float64_epsilon():
    a = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cosine_distance(a, b), 1 - torch.nn.functional.cosine_similarity(a, b))
    assert torch.equal(cosine_distance(a, a), torch.zeros(5, dtype=torch.float64))
    # Turning by a small angle t: the distance is t^2 / 2, which 1 - cos would round to 0.
    one, turned = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 1e-9]]).double()
    assert cosine_distance(one, turned).item() == pytest.approx(5e-19, rel=1e-6)
    assert 1 - torch.nn.functional.cosine_similarity(one, turned).item() == 0


def test_state_dicts_that_do_not_fit_are_refused(base):
    state = load_file(base / "model.safetensors")
    lacking = {name: tensor for name, tensor in state.items() if name != QUERY}
    with pytest.raises(LowraError, match=r"layers\.1\.attention\.q_proj\.weight' is missing or left over"):
        load_vit(base, lacking)
    with pytest.raises(LowraError, match=r"'vit\.more' is missing or left over"):
        load_vit(base, state | {"vit.more": torch.zeros(2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"needs images: give metrics\.activation_distance\.images=FOLDER"),
        ({"tokens": "max"}, r"metrics\.activation_distance\.tokens is 'max'; expected one of mean, flatten"),
        ({"blocks": "first"}, r"metrics\.activation_distance\.blocks is 'first'; expected one of last, all"),
        ({"batch_size": 0}, r"metrics\.activation_distance\.batch_size is 0; expected a whole number, at least 1"),
        ({"images_per_class": "abc"}, r"images_per_class is 'abc'; expected a whole number, at least 1"),
        ({"images": 7}, r"images is 7; expected text, not empty or null"),
        ({"images": "no-such-folder"}, r"no-such-folder has no sub-folders; expected one per class"),
    ],
)
def test_mistakes_are_refused(base, changes, message):
    def both(judge):
        judge.ready()
        judge.check(str(base), None, CPU)

    with pytest.raises(LowraError, match=message):
        both(metric(**changes))


def test_images_too_few_or_unreadable_are_named(base, images, tmp_path):
    with pytest.raises(LowraError, match=r"n01 holds 3 images; .*images_per_class asks for 4"):
        metric(images_per_class=4).check(str(base), images, CPU)
    (tmp_path / "n01").mkdir()
    for i in range(2):
        (tmp_path / "n01" / f"{i}.png").write_bytes(b"none")
    with pytest.raises(LowraError, match=r"0\.png is not a readable image"):
        metric(images=str(tmp_path)).check(str(base), images, CPU)
    with pytest.raises(LowraError, match="holds no safetensors weights"):
        metric().check(str(tmp_path), images, CPU)
    metric().check(str(base), images, CPU)


def test_inputs_are_the_images_wherever_they_lie(images, tmp_path):
    """Defect 1: scores were kept when the evaluation data changed."""
    first = metric().inputs(images)
    assert re.fullmatch("[0-9a-f]{16}", first)
    copied = shutil.copytree(images, tmp_path / "images")
    assert metric(images=str(copied)).inputs(None) == first
    assert metric(images_per_class=1).inputs(images) != first
    (copied / "n02" / "1.JPEG").write_bytes((copied / "n02" / "0.JPEG").read_bytes())
    assert metric().inputs(copied) != first


def test_a_missing_package_is_one_sentence(monkeypatch):
    metric().ready()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LowraError, match=r"Act\.-Dist\. needs .*transformers is not installed; pip install '?transf"):
        metric().ready()


def test_there_is_nothing_to_look_at(tmp_path):
    assert metric().gallery(tmp_path, {"reference": "Pre-FT"}, tmp_path / "view", "t") == []
    assert not (tmp_path / "view").exists()
