"""A LoRA file as weights beside the layers: what fits, what is refused, and what another loader makes of the file."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tiny_base import context, model_of, with_adapter, write_base, write_inputs
from trajectory_consistency.tcd import kohya_name
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill.sampling import initial_noise
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config import recipes, settings
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.adapter_weights import file_tensors, load_weights, using_file
from trajectory_consistency.trainer.lora_file import read_lora
from trajectory_consistency.trainer.models.unet.model import UNetModel

LINEAR, POINTWISE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.resnets.0.conv_shortcut"
COND = torch.randn((1, 77, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tmp_path: Path) -> UNetModel:
    return model_of(write_base(tmp_path / "base.safetensors"))


@pytest.fixture
def tensors(model: UNetModel) -> dict[str, torch.Tensor]:
    """Those of a LoRA for the model, of rank 4 and alpha 2, that does something."""
    weights = with_adapter(model, rank=4, alpha=2.0, effect=0.05)
    found = file_tensors(model, weights)
    model.adapter.eject()
    return found


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    return path


@torch.no_grad()
def predicted(model: UNetModel) -> torch.Tensor:
    x, t = initial_noise(0, (1, 4, 8, 8)), torch.tensor([499])
    return model.x0(x, model.schedule.point(t, 4), context(COND))


def test_weights_go_into_a_file_and_come_back(
    model: UNetModel, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before, weights = predicted(model), load_weights(model, saved(tmp_path / "lora.safetensors", tensors))
    assert not model.adapter.weights and not any(parameter.requires_grad for parameter in weights.parameters())
    assert torch.equal(predicted(model), before), "they are read, and not in use"
    again = file_tensors(model, weights)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_file_is_in_use_within_its_block_alone(
    model: UNetModel, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = saved(tmp_path / "lora.safetensors", tensors)
    with_adapter(model, effect=0.02)
    before, state = predicted(model), model.adapter.state
    with using_file(model, path):
        assert not torch.equal(predicted(model), before)
    assert torch.equal(predicted(model), before) and model.adapter.state == state
    with pytest.raises(ZeroDivisionError), using_file(model, path):
        raise ZeroDivisionError
    assert torch.equal(predicted(model), before) and FILE not in model.adapter.weights


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"lora_unet_none.lora_down.weight": (4, 8), "lora_unet_none.lora_up.weight": (8, 4)},
            "115 of 116 LoRA modules fit the model; not in the model: lora_unet_none",
        ),
        (
            {f"{kohya_name(LINEAR)}.lora_down.weight": (4, 7)},
            r"114 of 115 LoRA modules fit the model; wrong shape: lora_unet_mid_.*_to_q is 64 x 7, but .* 64 x 64",
        ),
    ],
    ids=["a layer too many", "a shape of another"],
)
def test_a_lora_that_does_not_fit_is_refused_and_what_fits_is_said(
    model: UNetModel,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    changed: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    more = {name: torch.zeros(shape) for name, shape in changed.items()}
    path = saved(tmp_path / "lora.safetensors", tensors | more)
    with pytest.raises(
        UserError, match=f"lora.safetensors is not a LoRA for this model: {message}; use a base of its family"
    ):
        load_weights(model, path)


def test_a_lora_of_another_base_is_refused(model: UNetModel, tmp_path: Path) -> None:
    other = {"lora_unet_x.lora_down.weight": torch.zeros(1, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 1)}
    with pytest.raises(UserError, match="0 of 1 LoRA modules fit the model; not in the model: lora_unet_x"):
        load_weights(model, saved(tmp_path / "lora.safetensors", other))


@pytest.mark.parametrize("part", ["dora_scale", "lora_mid.weight"])
def test_more_than_a_plain_lora_is_refused(
    model: UNetModel, tensors: dict[str, torch.Tensor], tmp_path: Path, part: str
) -> None:
    """DoRA's magnitudes, and LyCORIS' core of a convolution, which stands between the halves."""
    layer = "mid_block.resnets.0.conv1"
    name = kohya_name(layer)
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    if part == "dora_scale":
        tensors[f"{name}.{part}"] = torch.ones(len(up), 1, 1, 1)
    else:
        tensors[f"{name}.{part}"] = torch.zeros(4, 4, 3, 3)
        tensors[f"{name}.lora_down.weight"] = down[..., :1, :1]
    with pytest.raises(UserError, match=rf"lora\.safetensors: {name} has {part}, which is more than a plain LoRA"):
        load_weights(model, saved(tmp_path / "lora.safetensors", tensors))


def test_what_is_no_lora_is_refused(model: UNetModel, tmp_path: Path) -> None:
    hada = {f"{kohya_name(LINEAR)}.hada_w1_a": torch.zeros(64, 4)}
    with pytest.raises(UserError, match="weights of the kind LoHa"):
        load_weights(model, saved(tmp_path / "loha.safetensors", hada))
    with pytest.raises(UserError, match="there is no file"):
        load_weights(model, tmp_path / "none.safetensors")


@pytest.mark.parametrize("layer", [LINEAR, POINTWISE])
def test_halves_of_a_pointwise_convolution_and_of_a_linear_layer_stand_for_one_another(
    model: UNetModel, tensors: dict[str, torch.Tensor], tmp_path: Path, layer: str
) -> None:
    with using_file(model, saved(tmp_path / "own.safetensors", tensors)):
        expected = predicted(model)
    own = dict(tensors)
    names = [f"{kohya_name(layer)}.{part}" for part in ("lora_down.weight", "lora_up.weight")]
    for name in names:
        pointwise = tensors[name].ndim == 4
        assert pointwise == (layer == POINTWISE)
        tensors[name] = tensors[name].flatten(1) if pointwise else tensors[name][..., None, None]
    other = saved(tmp_path / "other.safetensors", tensors)
    read = file_tensors(model, load_weights(model, other))
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)
    with using_file(model, other):
        torch.testing.assert_close(predicted(model), expected, rtol=1e-5, atol=1e-5)
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(kohya_name(layer) + ".")}
    with using_file(model, saved(tmp_path / "without.safetensors", without)):
        assert (predicted(model) - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def of_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA of a recipe, with its target time, from a few steps on the tiny base beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    values = write_inputs(folder)
    small = ["data.resolution=64", "training.steps=3", "training.batch=2", "training.accumulate=1", "training.lr=1e-2"]
    small += ["training.warmup_steps=0", "preview.prompts=[]", "training.device=cpu"]
    given = [f"base.path={values['base']['path']}", f"data.folder={folder / 'data'}"]
    recipe = recipes.find(Path("sd15"))
    return run.run(settings.load(recipe, [*given, f"output.folder={folder}", *small]))


def pipeline_of(model: UNetModel) -> StableDiffusionPipeline:
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(unet=model.network, scheduler=scheduler, requires_safety_checker=False, **parts)


def test_diffusers_refuses_a_recipes_file_as_the_documentation_says(of_recipe: Path) -> None:
    assert any(name.startswith("tcd_target_time.") for name in load_file(of_recipe))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline_of(model_of(of_recipe.with_name("base.safetensors"))).load_lora_weights(str(of_recipe))
    text = " ".join(Path(__file__).parents[2].joinpath("docs", "training.md").read_text(encoding="utf-8").split())
    assert "diffusers refuses it" in text


@pytest.mark.parametrize("names", ["kohya", "peft"])
def test_diffusers_own_loader_makes_the_same_of_a_recipes_file_without_its_target_time(
    of_recipe: Path, tmp_path: Path, names: str
) -> None:
    """With PEFT, which the trainer has no part of."""
    base, lora = of_recipe.with_name("base.safetensors"), tmp_path / "exported.safetensors"
    assert main(["export", str(of_recipe), str(lora), "--names", names, "--without-target-time"]) == 0
    ours, theirs = model_of(base), model_of(base)
    pipeline_of(theirs).load_lora_weights(str(lora))
    plain = predicted(ours)
    ours.adapter.add(FILE, load_weights(ours, lora))
    assert ours.adapter.target_time is None
    expected = predicted(theirs)
    assert ((expected - plain).norm() / plain.norm()).item() > 1e-3, "the LoRA does something"
    torch.testing.assert_close(predicted(ours), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert read_lora(lora).metadata["tcd.target_time"] == "none"
    whole = {name: tensor for name, tensor in load_file(of_recipe).items() if "target_time" not in name}
    assert names == "peft" or all(torch.equal(load_file(lora)[name], tensor) for name, tensor in whole.items())
