"""LPIPS: against the package's own forward, on a tiny pipeline, and its refusals."""

import json
import re
import sys
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from lowra.builders.kohya_files import expected_modules
from lowra.builders.stable_diffusion_mini import NOISE_SCHEDULE, SAMPLER, make_tokenizer
from lowra.checkpoints.reading import component_folder, load_state_dict
from lowra.errors import LowraError
from lowra.metrics.lpips import Judge, Lpips, load_trunk

CONF = Path(__file__).parents[2] / "conf" / "metrics" / "lpips.yaml"
CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square", "a green circle"]


def settings(**changes):
    """The metric as configured, made small: a random squeeze trunk and two steps."""
    fields = {k: v for k, v in yaml.safe_load(CONF.read_text()).items() if not k.startswith("_")}
    return Lpips(
        **(fields | {"net": "squeeze", "trunk": "random", "guidance": 7.5, "steps": 2, "batch_size": 2} | changes)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(PROMPTS)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **text)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=PNDMScheduler(**NOISE_SCHEDULE, **SAMPLER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


def base_weights(base):
    """The base's own weights under the published layer names, as matrices."""
    states = {c: load_state_dict(component_folder(base, c)) for c in ("unet", "text_encoder")}
    return {
        (m.component, m.layer_name): states[m.component][f"{m.path}.weight"].flatten(1) for m in expected_modules(base)
    }


def test_judge_is_the_packages_lpips():
    images = torch.randint(0, 256, (2, 2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judge = Judge("squeeze", "random", None, CPU)
    ours = judge.distance(judge.features(images[0]), judge.features(images[1]))
    scaled = [F.interpolate(batch / 127.5 - 1, size=(224, 224), mode="bilinear", antialias=True) for batch in images]
    theirs = judge.model(*scaled).flatten()
    torch.testing.assert_close(ours, theirs)
    assert ours.min() > 0


def test_random_trunk_is_reproducible_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Judge("squeeze", "random", None, CPU).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = Judge("squeeze", "random", None, CPU).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth", "cpu", weights_only=True)
    assert torch.equal(first["lin0.model.1.weight"], heads["lin0.model.1.weight"])


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_trunk_weights_come_from_torchvisions_file(net, tmp_path):
    make = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}[net]
    # The classifier, most of a file, is not LPIPS's business.
    with torch.device("meta"):
        shapes = getattr(torchvision.models, make)().features.state_dict()
    features = {f"features.{name}": torch.rand(tensor.shape) for name, tensor in shapes.items()}
    torch.save(features, tmp_path / "trunk.pth")
    judge = Judge(net, "imagenet", str(tmp_path / "trunk.pth"), CPU)
    first = next(name for name in features if name.endswith("weight"))
    loaded = dict(judge.model.net.state_dict())
    assert len(loaded) == len(features)
    assert torch.equal(loaded[f"slice1.{first.removeprefix('features.')}"], features[first])


def test_missing_or_wrong_trunk_weights_say_how_to_get_them(evaluation, tmp_path, monkeypatch):
    with pytest.raises(LowraError, match=r"No trunk weights of vgg .*none\.pth.*download https.*trunk_path=FILE"):
        settings(net="vgg", trunk="imagenet", trunk_path=str(tmp_path / "none.pth")).ready()

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(LowraError, match=r"checkpoints/vgg16.*no route to host"):
        load_trunk("vgg", None)
    torch.save({"features.0.weight": torch.ones(2)}, tmp_path / "wrong.pth")
    with pytest.raises(LowraError, match="does not hold torchvision's alex weights"):
        Judge("alex", "imagenet", str(tmp_path / "wrong.pth"), CPU)


def test_pretty_name_shows_a_random_trunk():
    assert settings().pretty == "LPIPS (random trunk)"
    assert settings(trunk="imagenet").pretty == "LPIPS"
    assert settings().column == "lpips"


def test_scores(base, evaluation, tmp_path):
    metric = settings()
    metric.ready()
    metric.check(str(base), evaluation, CPU)
    scorer = metric.scorer(str(base), evaluation, CPU, tmp_path)
    weights = base_weights(base)
    assert {c for c, _ in weights} == {"unet", "text_encoder"}
    # The base's own weights, through published names and matrices, give its own pictures exactly.
    assert scorer.score(weights, "same") == {"lpips": 0.0}
    for component in ("unet", "text_encoder"):
        changed = {key: w * (1.5 if key[0] == component else 1) for key, w in weights.items()}
        assert scorer.score(changed, f"changed-{component}")["lpips"] > 0
    # Scoring leaves nothing behind: the base again is at zero again.
    assert scorer.score({}, None) == {"lpips": 0.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "changed-text_encoder",
        "changed-unet",
        "prompts.json",
        "reference",
        "same",
    ]
    reference = [Image.open(tmp_path / "reference" / f"{i:03d}.png") for i in range(3)]
    assert [picture.size for picture in reference] == [(8, 8)] * 3
    assert reference[0].tobytes() == Image.open(tmp_path / "same" / "000.png").tobytes()
    assert len(list((tmp_path / "changed-unet").iterdir())) == 3
    assert json.loads((tmp_path / "prompts.json").read_text()) == PROMPTS
    columns = {"reference": "Pre-FT (truth)", "changed-unet": "Another"}
    assert metric.gallery(tmp_path, columns, tmp_path / "view", "Two models") == [tmp_path / "view" / "images.png"]
    assert (tmp_path / "view" / "images.png").stat().st_size > 1000


def test_pictures_do_not_depend_on_the_batch_size(base, evaluation):
    one, three = (settings(batch_size=b).scorer(str(base), evaluation, CPU, None) for b in (1, 3))
    assert (one.draw({}, "").int() - three.draw({}, "").int()).abs().max() <= 1


def test_wrong_layers_are_refused(base, evaluation):
    scorer = settings().scorer(str(base), evaluation, CPU, None)
    with pytest.raises(LowraError, match=r"component 'vae'; expected one of unet, text_encoder"):
        scorer.score({("vae", "x"): torch.ones(1, 1)}, "")
    with pytest.raises(LowraError, match="no layer 'nowhere'"):
        scorer.score({("unet", "nowhere"): torch.ones(1, 1)}, "")


def test_prompts(tmp_path, evaluation, monkeypatch):
    coco = tmp_path / "captions_val2014.json"
    coco.write_text(json.dumps({"annotations": [{"id": i, "caption": f"caption {i} "} for i in (5, 3, 4)]}))
    assert settings(captions=str(coco), n_prompts=2).read_prompts(None) == ["caption 5", "caption 3"]
    assert settings(captions=str(coco)).read_prompts(evaluation) == PROMPTS
    with pytest.raises(LowraError, match=r"holds 3 captions and 100 are asked for"):
        settings(captions=str(coco)).read_prompts(None)
    with pytest.raises(LowraError, match=r"prompts file .*none\.json does not exist"):
        settings(captions=str(tmp_path / "none.json")).read_prompts(None)
    coco.write_text("[]")
    with pytest.raises(LowraError, match="not in COCO's captions format"):
        settings(captions=str(coco)).read_prompts(None)
    coco.write_text("{")
    with pytest.raises(LowraError, match="no readable JSON"):
        settings(captions=str(coco)).read_prompts(None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(LowraError, match=r"Cannot download the prompts from http://127\.0\.0\.1:9/x\.json"):
        settings(captions="http://127.0.0.1:9/x.json").read_prompts(None)


def test_inputs_are_the_prompts_and_the_judge_wherever_they_lie(evaluation, tmp_path):
    """Defect 1: scores were kept when the evaluation data changed."""
    first = settings().inputs(evaluation)
    assert re.fullmatch("[0-9a-f]{16}", first)
    coco = tmp_path / "captions.json"
    coco.write_text(json.dumps({"annotations": [{"caption": prompt} for prompt in PROMPTS]}))
    assert settings(captions=str(coco), n_prompts=3).inputs(None) == first
    assert settings(captions=str(coco), n_prompts=2).inputs(None) != first
    assert settings(net="alex").inputs(evaluation) != first
    trunks = [tmp_path / f"{name}.pth" for name in "abc"]
    for trunk, content in zip(trunks, (b"x", b"x", b"y"), strict=True):
        trunk.write_bytes(content)
    one, same, other = (settings(trunk="imagenet", trunk_path=str(p)).inputs(evaluation) for p in trunks)
    assert one == same
    assert len({first, one, other}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": "vgg19"}, r"metrics\.lpips\.net is 'vgg19'; expected one of vgg, alex, squeeze"),
        ({"trunk": "coco"}, r"metrics\.lpips\.trunk is 'coco'; expected one of imagenet, random"),
        ({"n_prompts": 0}, r"metrics\.lpips\.n_prompts is 0; expected a whole number, at least 1"),
        ({"steps": 5000}, r"metrics\.lpips\.steps is 5000; expected a whole number, at least 1 and at most 1000"),
        ({"guidance": "high"}, r"metrics\.lpips\.guidance is 'high'; expected a number, at least 0"),
        ({"batch_size": 1.0}, r"metrics\.lpips\.batch_size is 1\.0; expected a whole number, at least 1"),
        ({"seed": 2**64}, r"metrics\.lpips\.seed is 18446744073709551616; expected a whole number, at least 0"),
        ({"captions": None}, r"metrics\.lpips\.captions is null; expected text"),
        ({"trunk_path": 3}, r"metrics\.lpips\.trunk_path is 3; expected text, not empty or null"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(LowraError, match=message):
        settings(**changes).ready()


@pytest.mark.parametrize("package", ["diffusers", "lpips", "transformers", "torchvision"])
def test_a_missing_package_is_one_sentence(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LowraError, match=rf"LPIPS needs .*: {package} is not installed; pip install '?{package}"):
        settings().ready()
