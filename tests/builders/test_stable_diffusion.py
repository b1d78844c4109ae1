"""The collector and the miniature: real files of both, very small."""

import dataclasses
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from lowra.bench.schema import open_dataset
from lowra.bench.updates import Update
from lowra.builders.kohya_files import LoraFile, expected_modules, write_kohya
from lowra.builders.stable_diffusion import CIVITAI, Adapter, collect
from lowra.builders.stable_diffusion_mini import load_pipeline, make_tokenizer
from lowra.builders.stable_diffusion_pictures import (
    COLOURS,
    STYLES,
    all_scenes,
    describe,
    draw,
    random_scenes,
    style_statistics,
)
from lowra.checkpoints.reading import component_folder, load_state_dict
from lowra.checks import make
from lowra.errors import LowraError
from lowra.paths import conf_dir, register_resolvers


def configured(name):
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return make(compose(overrides=[f"+builder={name}"]).builder, "builder")


def tiny(count=2, **changes):
    made = configured("stable_diffusion_mini")
    miniature = dataclasses.replace(
        made.miniature,
        **{
            "unet_channels": [16, 16],
            "text_width": 16,
            "text_layers": 1,
            "vae_channels": [8, 16],
            "pictures": 32,
            "vae_steps": 2,
            "vae_batch": 4,
            "text_steps": 2,
            "text_batch": 4,
            "base_steps": 2,
            "base_batch": 4,
            "style_pictures": 8,
            "rank": 2,
            "alpha": 1,
            "lora_steps": 3,
            "lora_batch": 4,
            "control_prompts": 4,
            "prompts": 3,
        }
        | changes,
    )
    return dataclasses.replace(made, count=count, miniature=miniature)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    return folder, tiny().build(folder)


@pytest.fixture
def loras(built, tmp_path):
    """A folder of two kohya files of the tiny base, ranks 2 and 3, named by version ids, and the base's modules."""
    folder, _ = built
    modules = expected_modules(folder / "base")
    versions = [entry["version"] for entry in json.loads(CIVITAI.read_text())][:2]
    for rank, version in zip((2, 3), reversed(versions), strict=True):
        torch.manual_seed(version)
        updates = {
            m: Update(str(version), rank, 1.0, torch.randn(rank, m.shape[1]), torch.randn(m.shape[0], rank))
            for m in modules
        }
        write_kohya(tmp_path / f"{version}.safetensors", updates)
    return tmp_path, modules


def builder(built, folder, **changes):
    made = configured("stable_diffusion_build")
    return dataclasses.replace(made, **{"base": str(built[0] / "base"), "loras": str(folder), "count": 2} | changes)


# ---- The miniature ------------------------------------------------------------------------------------------------


def test_miniature_adapts_every_kind_of_module(built):
    _, made = built
    table = open_dataset(made.dataset)
    assert table.model_names == tuple(STYLES)[:2]
    # Four attention blocks of twelve modules and one text layer of six; checkpoint names as published.
    assert len(table) == 4 * 12 + 6
    assert [info.model for info in table.infos] == ["unet"] * 48 + ["text_encoder"] * 6
    assert all(info.name.startswith("text_model.encoder.layers.0.") for info in table.infos[48:])
    for index in range(len(table)):
        layer = table.read(index)
        assert all(lora.rank == 2 and lora.alpha == 1.0 and lora.delta().abs().max() > 0 for lora in layer.loras)


def test_miniature_merges_to_the_pipeline_that_was_trained(built):
    folder, made = built
    pipeline = load_pipeline(folder / "base")
    style = next(iter(STYLES))
    path = folder / "loras" / style / f"{style}.safetensors"
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    table = open_dataset(made.dataset)
    for index, info in enumerate(table.infos):
        layer = table.read(index, [0])
        name = info.name.removeprefix("text_model.")
        fused = getattr(pipeline, info.model).state_dict()[name].flatten(1)
        torch.testing.assert_close(layer.weight + layer.loras[0].delta(), fused, atol=1e-6, rtol=1e-5)
    state = load_state_dict(component_folder(folder / "base", "unet"))
    conv = next(i for i, info in enumerate(table.infos) if info.name.endswith("proj_in.weight"))
    assert torch.equal(table.read(conv, []).weight, state[table.infos[conv].name][:, :, 0, 0])


def test_miniature_report_and_prompts(built):
    _, made = built
    report = json.loads(json.dumps(made.report))
    assert set(report) == {"autoencoder", "base", "loras", "evaluation", "dataset"}
    assert set(report["base"]["prompt_control"]) == {"shape", "colour", "background"}
    assert set(report["loras"]) == set(tuple(STYLES)[:2])
    assert report["dataset"]["layers"] == 54
    assert len(json.loads((made.evaluation / "prompts.json").read_text())) == 3


def test_miniature_resumes(built, monkeypatch):
    folder, made = built
    monkeypatch.setattr("lowra.builders.stable_diffusion_mini._train", None)  # nothing is trained again
    again = tiny().build(folder)
    assert dataclasses.asdict(again) == json.loads(json.dumps(dataclasses.asdict(made), default=str)) | {
        "dataset": made.dataset,
        "evaluation": made.evaluation,
    }


def test_miniature_has_room_for_the_exact_method():
    made = configured("stable_diffusion_mini")
    made.check()
    sizes = made.miniature
    assert 3 * sizes.rank <= min(*sizes.unet_channels, sizes.text_width)
    assert made.count == len(STYLES) == 15


def test_miniature_refuses_impossible_sizes():
    with pytest.raises(LowraError, match=r"builder.count=16 .*there are 15 styles"):
        tiny(count=16).check()
    with pytest.raises(LowraError, match=r"image_size=18 must be a multiple of 4"):
        tiny(image_size=18).check()
    with pytest.raises(LowraError, match=r"text_width is 18; expected a whole number, a multiple of 4"):
        tiny(text_width=18).check()
    with pytest.raises(LowraError, match=r"builder.base and builder.loras are for builds from given files"):
        dataclasses.replace(tiny(), base="/local").check()
    with pytest.raises(LowraError, match=r"rank=17 does not fit layers of width 16"):
        tiny(rank=17).check()
    with pytest.raises(LowraError, match=r"prompts=5 must be from 1 to control_prompts=4"):
        tiny(prompts=5).check()


def test_tokenizer_knows_every_word():
    captions = [scene.caption for scene in all_scenes()]
    tokenizer = make_tokenizer(captions)
    for caption in captions:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
        assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length


# ---- Pictures -----------------------------------------------------------------------------------------------------


def test_pictures_show_what_captions_say():
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(120, generator)
    assert len(set(scenes)) == len(all_scenes()) == 120
    for size, share in ((16, 0.95), (32, 0.99)):
        seen = describe(draw(scenes, size, generator))
        assert sum(a == b for a, b in zip(scenes, seen, strict=True)) >= share * len(scenes)
    assert scenes[0].caption.split()[1] in COLOURS


def test_styles_change_every_picture_and_differ():
    scenes = random_scenes(32, torch.Generator().manual_seed(0))
    plain = draw(scenes, 16, torch.Generator().manual_seed(1))
    styled = {name: draw(scenes, 16, torch.Generator().manual_seed(1), name) for name in STYLES}
    for images in styled.values():
        assert images.shape == plain.shape
        assert (images - plain).abs().mean(dim=(1, 2, 3)).min() > 0.01
    statistics = torch.stack([style_statistics(images) for images in styled.values()])
    assert torch.pdist(statistics).min() > 0.5


# ---- The collector ------------------------------------------------------------------------------------------------


def test_collects_a_folder_in_table_order_with_mixed_ranks(built, loras, tmp_path):
    folder, _ = loras
    names = [entry["name"] for entry in json.loads(CIVITAI.read_text())][:2]
    maker = builder(built, folder)
    maker.check()
    made = maker.build(tmp_path / "out")
    table = open_dataset(made.dataset)
    assert list(table.model_names) == names
    assert table.infos[0].ranks == (3, 2)
    assert made.report["dataset"]["ranks"] == {names[0]: [3], names[1]: [2]}
    assert made.base == maker.base
    assert made.evaluation is None


def test_files_of_any_name(built, loras, tmp_path):
    folder, _ = loras
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / f"my_{path.name}")
    assert [a.name for a in builder(built, folder).adapters()] == sorted(p.stem for p in folder.glob("my_*"))


def test_missing_modules_are_listed_or_left_out(built, loras, tmp_path):
    folder, modules = loras
    path = sorted(folder.glob("*.safetensors"))[0]
    dropped = modules[7]
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(f"{dropped.kohya_name}.")}, path)
    with pytest.raises(LowraError, match=rf"adapts 53 of the base model's 54 modules; missing: {dropped.kohya_name}\."):
        builder(built, folder).check()
    made = builder(built, folder, allow_missing=True).build(tmp_path / "out")
    assert made.report["dataset"]["left_out"] == [dropped.layer_name]
    assert len(open_dataset(made.dataset)) == 53


def test_untrained_modules_are_named_or_left_out(built, loras, tmp_path):
    folder, modules = loras
    path = sorted(folder.glob("*.safetensors"))[0]
    stored = load_file(path)
    stored[f"{modules[3].kohya_name}.lora_up.weight"].zero_()
    save_file(stored, path)
    assert LoraFile(path, modules).untrained == (modules[3],)
    with pytest.raises(LowraError, match=rf"1 untrained modules \(B is zero\), the first '{modules[3].kohya_name}'"):
        builder(built, folder).check()
    made = builder(built, folder, allow_missing=True).build(tmp_path / "out")
    assert made.report["dataset"]["left_out"] == [modules[3].layer_name]


def test_nothing_in_common(built, loras, tmp_path):
    folder, modules = loras
    paths = sorted(folder.glob("*.safetensors"))
    for part, path in zip((modules[:5], modules[5:]), paths, strict=True):
        names = tuple(f"{module.kohya_name}." for module in part)
        save_file({k: v for k, v in load_file(path).items() if k.startswith(names)}, path)
    adapters = [Adapter(path.stem, path) for path in paths]
    with pytest.raises(LowraError, match="No layer is adapted by every LoRA file"):
        collect(str(built[0] / "base"), adapters, tmp_path / "out" / "dataset", allow_missing=True)


def test_folder_and_count(built, loras, tmp_path):
    folder, _ = loras
    with pytest.raises(LowraError, match=r"LoRA folder .*nowhere does not exist.*download_civitai"):
        builder(built, tmp_path / "nowhere").check()
    with pytest.raises(LowraError, match=r"holds 2 \.safetensors files; expected count=15.*civitai\.com"):
        builder(built, folder, count=15).check()


def test_full_size_configuration():
    made = configured("stable_diffusion_build")
    assert made.count == 15
    assert (made.guidance, made.inference_steps) == (7.5, 50)  # of the default pipeline (Appendix D.3)
    with pytest.raises(LowraError, match=r"needs builder.base and builder.loras=FOLDER"):
        made.check()
