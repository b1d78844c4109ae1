"""The ViT builders: the miniature end to end, and the full-size recipe on a stand-in with the true file formats."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from lowra.bench.merging import merge
from lowra.bench.schema import open_dataset
from lowra.builders import vit
from lowra.builders.base import recipe_key
from lowra.builders.kinds import KINDS, Settings
from lowra.builders.peft_adapters import Adapter
from lowra.builders.vit import VitBuilder
from lowra.builders.vit_mini import Miniature
from lowra.builders.vit_pictures import PRETRAINING_CLASSES, TASKS, draw_images, draw_thing
from lowra.checks import make
from lowra.errors import LowraError
from lowra.paths import conf_dir


def configured(name, **changes):
    """The builder of a config, with fields changed."""
    with initialize_config_dir(str(conf_dir()), version_base=None):
        builder = make(compose(overrides=[f"+builder={name}"]).builder, "builder")
    return dataclasses.replace(builder, **changes)


TINY = Miniature(
    image_size=16,
    patch_size=8,
    width=16,
    depth=2,
    heads=2,
    initial_std=0.1,
    train=40,
    val=20,
    pretraining_images=120,
    held_out=30,
    epochs=1,
    batch_size=40,
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup=0.1,
    evaluation_per_class=1,
)
SMALL = {"batch_size": 20, "epochs": 3, "tasks": ["dtd", "kitti"]}


def miniature(**changes):
    return configured("vit_mini", **{"miniature": TINY, **SMALL, **changes})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini") / "vit"
    builder = miniature()
    builder.check()
    return folder, builder.build(folder)


# ---- The miniature ----------------------------------------------------------------------------------------------


def test_miniature_end_to_end(built):
    folder, result = built
    table = open_dataset(result.dataset)
    assert table.model_names == ("dtd", "kitti")
    assert len(table) == 2 * TINY.depth
    assert table.infos[0].name == "vit.encoder.layer.0.attention.attention.query.weight"
    assert {info.ranks for info in table.infos} == {(2, 2)}
    stored = load_file(Path(result.base) / "model.safetensors")
    for i, info in enumerate(table.infos):
        layer = table.read(i)
        assert torch.equal(layer.weight, stored[info.name])
        assert all(lora.delta().norm() > 0 for lora in layer.loras)
        # No two LoRAs start from the same A.
        assert not torch.allclose(layer.loras[0].A, layer.loras[1].A, atol=1e-3)
    assert result.evaluation is not None
    assert len(list(result.evaluation.glob("class_*/*.png"))) == PRETRAINING_CLASSES
    assert (Path(result.base) / "preprocessor_config.json").exists()
    assert not list(folder.rglob("trainer"))
    assert not list(folder.rglob("*.partial"))
    assert 0 <= result.report["base"]["accuracy"] <= 1
    assert all(ratio > 0 for ratio in result.report["update_to_weight_norm"].values())


def test_a_shared_frozen_a_is_the_same_in_all_tasks(tmp_path):
    table = open_dataset(miniature(shared_a=True).build(tmp_path / "vit").dataset)
    for i in range(len(table)):
        first, second = table.read(i).loras
        assert torch.equal(first.A, second.A)
        assert not torch.allclose(first.B, second.B, atol=1e-4)
    assert not torch.equal(table.read(0).loras[0].A, table.read(1).loras[0].A)


def test_a_frozen_a_can_be_shared_by_twos(tmp_path):
    tasks = list(TASKS)[:4]
    table = open_dataset(miniature(shared_a=True, shared_among=2, tasks=tasks).build(tmp_path / "vit").dataset)
    first, second, third, fourth = table.read(0).loras
    assert torch.equal(first.A, second.A)
    assert torch.equal(third.A, fourth.A)
    assert not torch.equal(first.A, third.A)
    with pytest.raises(LowraError, match=r"needs builder\.shared_a=true"):
        miniature(shared_among=2).check()


def test_second_build_makes_nothing(built):
    folder, result = built
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = miniature().build(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again == result


def test_selections_share_a_folder_and_its_parts(built, tmp_path):
    folder, result = built
    one = miniature(tasks=["kitti"])
    assert recipe_key(one) == recipe_key(miniature())
    assert recipe_key(miniature(rank=1)) != recipe_key(miniature())
    made = one.build(folder)
    assert made.dataset != result.dataset
    assert made.report["tasks"]["kitti"] == result.report["tasks"]["kitti"]


def test_the_kept_checkpoint_is_the_one_of_best_validation_loss(built):
    folder, result = built
    from peft import PeftModel

    report = result.report["tasks"]["dtd"]
    model = transformers.ViTForImageClassification.from_pretrained(
        result.base, num_labels=report["classes"], ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(model, folder / "loras" / "02_dtd").eval()
    val = vit.Images.read(folder / "vtab-1k" / "dtd", vit.VAL_LIST, miniature()._processor(Path(result.base)))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(pixel_values=val.pixel_values).logits, val.labels)
    assert loss.item() == pytest.approx(report["val_loss"], rel=1e-5)


def test_killed_build_resumes_where_it_was(built, tmp_path, monkeypatch):
    _, result = built
    builder = miniature()
    whole = vit.progress

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # two steps an epoch: in the second one
                raise KeyboardInterrupt

    def killing(trainer, label):
        if label == "kitti":
            trainer.add_callback(Kill())
        return whole(trainer, label)

    monkeypatch.setattr(vit, "progress", killing)
    with pytest.raises(KeyboardInterrupt):
        builder.build(tmp_path / "vit")
    first, second = tmp_path / "vit" / "loras" / "02_dtd", tmp_path / "vit" / "loras" / "10_kitti.partial"
    assert vit.last_checkpoint(second / "trainer") == str(second / "trainer" / "checkpoint-2")
    made = (first / "adapter_model.safetensors").stat().st_mtime_ns

    trained = []
    monkeypatch.setattr(vit, "progress", lambda trainer, label: trained.append(label) or whole(trainer, label))
    resumed = builder.build(tmp_path / "vit")
    assert trained == ["kitti"]
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == made
    # The same numbers as without the kill: seeds and random states are restored.
    assert resumed.report["tasks"]["kitti"]["val_loss"] == pytest.approx(result.report["tasks"]["kitti"]["val_loss"])
    table, same = open_dataset(resumed.dataset), open_dataset(result.dataset)
    for i in range(len(table)):
        for ours, theirs in zip(table.read(i).loras, same.read(i).loras, strict=True):
            torch.testing.assert_close(ours.delta(), theirs.delta())


def test_checkpoints_cut_short_are_not_resumed_from(tmp_path):
    assert vit.last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert vit.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_drawn_images_are_seeded_and_depend_on_the_label():
    for classes, draw in [*TASKS.values(), (PRETRAINING_CLASSES, draw_thing)]:
        images, labels = draw_images(draw, classes, 4, 16, np.random.default_rng(3))
        again, _ = draw_images(draw, classes, 4, 16, np.random.default_rng(3))
        assert images.shape == (4, 16, 16, 3)
        assert images.dtype == np.uint8
        assert np.array_equal(images, again)
        assert labels.max() < classes
        assert images.std() > 5
        # Every class can be drawn, and the first and the last differ.
        pair = [np.asarray(draw(label, np.random.default_rng(5))) for label in range(classes)]
        assert not np.array_equal(pair[0], pair[-1])


# ---- Full size, on a stand-in with the true file formats --------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A base folder as google/vit-base-patch16-224's, and two VTAB-1k task folders."""
    folder = tmp_path_factory.mktemp("stand_in")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=10,
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "base")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    for task, suffix in (("cifar", "png"), ("smallnorb_azi", "jpg")):
        images = folder / "vtab-1k" / task / "images"
        images.mkdir(parents=True)
        for split, count in (("train800", 24), ("val200", 8)):
            lines = []
            for i in range(count):
                name = f"{split}_{i:06}.{suffix}"
                # Grey and colour, of any size: as in VTAB.
                shape = (20, 30 + i) if suffix == "jpg" else (32, 32, 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(images / name)
                lines.append(f"images/{name} {i % 3}\n")
            (folder / "vtab-1k" / task / f"{split}.txt").write_text("".join(lines))
    return folder


def full(stand_in, **changes):
    settings = {"base": str(stand_in / "base"), "data": str(stand_in / "vtab-1k"), "rank": 4, "alpha": 4}
    settings |= {"batch_size": 8, "epochs": 2, "use_cpu": True, "tasks": ["cifar", "smallnorb_azi"]}
    return configured("vit_build", **{**settings, **changes})


def test_full_size_recipe_on_a_stand_in(stand_in, tmp_path):
    builder = full(stand_in, normalisation="imagenet", resample="bicubic", warmup=0.25, gradient_accumulation=2)
    builder.check()
    result = builder.build(tmp_path / "vit")
    assert result.base == str(stand_in / "base")
    assert result.evaluation is None
    table = open_dataset(result.dataset)
    assert table.model_names == ("cifar", "smallnorb_azi")
    names = [
        f"vit.encoder.layer.{i}.attention.attention.{part}.weight" for i in range(2) for part in ("query", "value")
    ]
    assert [info.name for info in table.infos] == names
    adapter = json.loads((tmp_path / "vit" / "loras" / "00_cifar" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 4, 0.1)
    assert adapter["modules_to_save"] == ["classifier"]
    assert result.report["tasks"]["cifar"]["classes"] == 3


def test_configs_follow_table_5():
    full_size, mini = configured("vit_build"), configured("vit_mini")
    table_5 = (full_size.rank, full_size.alpha, full_size.learning_rate, full_size.batch_size, full_size.epochs)
    assert table_5 == (16, 16, 9e-3, 128, 20)
    assert full_size.tasks == mini.tasks == list(TASKS)
    assert mini.rank / mini.miniature.width == 16 / 768
    assert (mini.miniature.train, mini.miniature.val) == (800, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["cifar", "sun397"]}, r"Unknown ViT task 'sun397'; known: caltech101, cifar, "),
        ({"tasks": ["cifar", "cifar"]}, r"expected different tasks"),
        ({"tasks": []}, r"builder.tasks is \[\]; expected a list \(each text\), not empty"),
        ({"tasks": ["dtd"]}, r"no folder of task 'dtd' in .*; found: cifar, smallnorb_azi"),
        ({"normalisation": "none"}, r"builder.normalisation is 'none'; expected one of base, imagenet"),
        ({"optimiser": "sgdm"}, r"Unknown builder.optimiser 'sgdm'; known: .*adamw_torch"),
        ({"schedule": "flat"}, r"Unknown builder.schedule 'flat'; known: .*linear"),
        ({"target_modules": ["query"]}, r"target_modules is \['query'\]; expected a list \(each one of q_proj, "),
        ({"target_modules": []}, r"target_modules is \[\]; expected a list .*, not empty"),
        ({"modules_to_save": ["pooler"]}, r"Unknown module in builder.modules_to_save 'pooler'; known: classifier"),
        ({"learning_rate": "abc"}, r"builder.learning_rate is 'abc'; expected a number, above 0"),
        ({"learning_rate": -1}, r"builder.learning_rate is -1; expected a number, above 0"),
        ({"batch_size": 0}, r"builder.batch_size is 0; expected a whole number, at least 1"),
        ({"dropout": 1.0}, r"builder.dropout is 1.0; expected a number, at least 0 and below 1"),
        ({"seed": True}, r"builder.seed is True; expected a whole number"),
        ({"miniature": TINY}, r"builder.miniature makes its own; use source=build"),
        ({"precision": "float16"}, r"float16 needs CUDA"),
        ({"precision": "int8"}, r"builder.precision is 'int8'; expected one of float32"),
        ({"rank": 17}, r"builder.rank is 17; expected 1 to 16"),
        ({"data": None}, r"needs builder.base .* and builder.data=FOLDER"),
        ({"base": "no-such-folder/anywhere"}, r"not a local folder and cannot be had from the Hub"),
    ],
)
def test_mistakes_are_refused_before_work(stand_in, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LowraError, match=message):
        full(stand_in, **changes).check()


def test_malformed_lists_and_missing_files_are_named(stand_in, tmp_path):
    data = tmp_path / "vtab-1k"
    shutil.copytree(stand_in / "vtab-1k" / "cifar", data / "cifar")
    builder = full(stand_in, data=str(data), tasks=["cifar"])
    train = data / "cifar" / "train800.txt"
    lines = train.read_text()
    for text, message in (
        (lines + "images/a.png\n", r"line 25, is 'images/a.png'; expected \"images/NAME.png LABEL\""),
        (lines + "images/a.png cat\n", r"line 25, is 'images/a.png cat'"),
        (lines + "images/a.png 2\n", r"line 25, names images/a.png, which is not in"),
        ("\n", r"lists no images"),
    ):
        train.write_text(text)
        with pytest.raises(LowraError, match=message):
            builder.check()
    train.unlink()
    with pytest.raises(LowraError, match=r"has no train800\.txt; expected the VTAB-1k layout"):
        builder.check()


def test_base_folders_that_lack_something(stand_in, tmp_path):
    for lacking, message in (
        ("model.safetensors", r"holds no safetensors weights"),
        ("config.json", r"has no config\.json"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json"),
    ):
        shutil.copytree(stand_in / "base", tmp_path / lacking)
        (tmp_path / lacking / lacking).unlink()
        with pytest.raises(LowraError, match=message):
            full(stand_in, base=str(tmp_path / lacking)).check()
    transformers.BertConfig().save_pretrained(tmp_path / "preprocessor_config.json")
    with pytest.raises(LowraError, match=r"a model of type 'bert'; the ViT builder needs 'vit'"):
        full(stand_in, base=str(tmp_path / "preprocessor_config.json")).check()


def test_unreadable_image_is_named(stand_in, tmp_path):
    data = tmp_path / "vtab-1k"
    shutil.copytree(stand_in / "vtab-1k" / "cifar", data / "cifar")
    (data / "cifar" / "images" / "train800_000003.png").write_bytes(b"no image")
    with pytest.raises(LowraError, match=r"train800_000003\.png is not a readable image"):
        full(stand_in, data=str(data), tasks=["cifar"]).build(tmp_path / "vit")


def test_training_of_other_weights_is_noticed(stand_in, tmp_path):
    folder = tmp_path / "vit"
    full(stand_in, tasks=["cifar"]).build(folder)
    base = stand_in / "base"
    merged = transformers.ViTForImageClassification.from_pretrained(base)
    with pytest.raises(LowraError, match=r"should change 4 weights; 'vit\.encoder\.layer\.0.*query\.weight'"):
        vit.check_changed(base, folder / "loras" / "00_cifar", merged, ["classifier"])


def test_configs_are_frozen_dataclasses():
    assert dataclasses.is_dataclass(VitBuilder)
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        configured("vit_mini").rank = 3


# ---- Kinds of fine-tuning ---------------------------------------------------------------------------------------

LEAVES = {
    "rslora": "lora",
    "pissa": "lora",
    "mica": "lora",
    "vera": "lora",
}  # as what a kind is stored, if not as itself


def folder_of(builder, cache):
    return cache / f"vit-mini-{recipe_key(builder)}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fine_tuned_on_the_same_base(cache, kind):
    builder = miniature(kind=kind, target_modules=["q_proj", "fc2"])
    builder.check()
    result = builder.build(folder_of(builder, cache))
    plain = miniature(target_modules=["q_proj", "fc2"])
    assert Path(result.base) == folder_of(plain, cache) / "base"
    assert result.evaluation == folder_of(plain, cache) / "evaluation"
    table = open_dataset(result.dataset)
    assert table.model_names == ("dtd", "kitti")
    assert len(table) == 2 * TINY.depth
    stored = load_file(Path(result.base) / "model.safetensors")
    for i, info in enumerate(table.infos):
        layer = table.read(i)
        assert torch.equal(layer.weight, stored[info.name])
        for update, merged in zip(layer.loras, merge(layer), strict=True):
            assert update.kind == LEAVES.get(kind, kind)
            assert merged.isfinite().all()
            assert (merged - layer.weight).norm() > 1e-4 * layer.weight.norm()
    if kind == "pissa":
        assert {info.ranks for info in table.infos} == {(4, 4)}
    if kind == "mica":  # B is the base's last left singular vectors, whatever the task
        left = torch.linalg.svd(layer.weight)[0][:, -2:]
        assert all(torch.allclose(update.B @ update.B.mT, left @ left.mT, atol=1e-4) for update in layer.loras)
    if kind == "ia3":  # the second layer of a block's MLP has its inputs scaled
        assert {tuple(table.read(i).loras[0].tensors["scale"].shape) for i in range(4)} == {(16, 1), (1, 64)}
    assert all(0 <= report["val_accuracy"] <= 1 for report in result.report["tasks"].values())
    assert all(ratio > 0 for ratio in result.report["update_to_weight_norm"].values())


def test_a_whole_fine_tune_is_a_difference_of_full_rank_and_its_head(cache):
    builder = miniature(kind="full", target_modules=["q_proj", "fc2"])
    built = builder.build(folder_of(builder, cache))
    adapter = Adapter(folder_of(builder, cache) / "loras" / "02_dtd")
    assert adapter.type == "FULL"
    stored = load_file(adapter.folder / "adapter_model.safetensors")
    assert any(key.startswith("base_model.model.classifier") for key in stored)
    difference = open_dataset(built.dataset).read(0).loras[0].tensors["difference"]
    assert torch.linalg.matrix_rank(difference) > 8  # of 16; LoRA's would be 2


def test_frozen_shared_factors_need_a_random_a():
    miniature(kind="dora", shared_a=True).check()
    with pytest.raises(LowraError, match=r"builder\.kind=vera has none; it is for lora, rslora, dora"):
        miniature(kind="vera", shared_a=True).check()


def test_kinds_and_their_settings_are_checked():
    with pytest.raises(LowraError, match=r"builder\.kind is 'boft'; expected one of lora, rslora, dora, pissa, mica"):
        miniature(kind="boft").check()
    kinds = miniature().kinds
    with pytest.raises(LowraError, match=r"builder\.kind=lokr needs a size; give builder\.kinds\.lokr\.size"):
        miniature(kind="lokr", kinds=dataclasses.replace(kinds, lokr=Settings())).check()
    with pytest.raises(LowraError, match=r"kinds\.oft\.size is 5; its blocks must divide the 16 inputs"):
        miniature(kind="oft", kinds=dataclasses.replace(kinds, oft=Settings(size=5))).check()
    with pytest.raises(LowraError, match=r"builder\.kinds\.ia3\.learning_rate is -1"):
        miniature(kind="ia3", kinds=dataclasses.replace(kinds, ia3=Settings(learning_rate=-1))).check()


def test_settings_of_other_kinds_are_no_part_of_a_recipe():
    plain = miniature()
    changed = dataclasses.replace(plain.kinds, vera=Settings(rank=3))
    assert recipe_key(miniature(kinds=changed)) == recipe_key(plain)
    assert recipe_key(miniature(kind="vera", kinds=changed)) != recipe_key(miniature(kind="vera"))
    assert recipe_key(miniature(kind="dora")) != recipe_key(plain)
