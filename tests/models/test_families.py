"""SD1.5, SD2.x and SDXL from files and folders, against diffusers' own readers and pipelines."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from small_bases import Parts, random_parts, save_folder, shrink, to_state, write
from trajectory_consistency.tcd import kohya_name
from trajectory_consistency.tcd.unet_layers import TARGETS, chosen_layers
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models import lora_layouts, open_checkpoint
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.families import Family
from trajectory_consistency.trainer.models.unet.prompt import clip_tokenizer
from trajectory_consistency.trainer.models.unet.text import CLIPS

CPU, FLOAT = torch.device("cpu"), torch.float32
FAMILIES: list[Family] = ["sd15", "sd2", "sdxl"]
CAPTIONS = ["", "a red circle left on a blue background", "word " * 100]
REAL = bases.ROOT
SD2_BIAS = ldm.UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "bases")


def load(path: Path) -> Parts:
    base = opened(path)
    return Parts(base.load(FLOAT, CPU).network, base.load_autoencoder(CPU).vae, base.load_text_encoder(CPU))


def opened(path: Path | str, **base: Any) -> UNetCheckpoint:
    return UNetCheckpoint(BaseConfig(path=str(path), **base))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_file_to_folder_to_file_nothing_is_lost(family: Family, tmp_path: Path) -> None:
    state = to_state(random_parts(family))
    from_file = load(write(tmp_path / "a.safetensors", state))
    from_folder = load(save_folder(from_file, tmp_path / "folder"))
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(from_file, from_folder, strict=True))
    assert same(to_state(from_folder), state)
    scale = {"sdxl": 0.13025}.get(family, 0.18215)
    assert from_file.vae.config.scaling_factor == from_folder.vae.config.scaling_factor == scale
    assert opened(tmp_path / "folder").family == opened(tmp_path / "a.safetensors").family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_read_as_diffusers_reads_it(family: Family, tmp_path: Path) -> None:
    state = to_state(random_parts(family))
    parts = load(write(tmp_path / "a.safetensors", state))
    for ours, kind, part in ((parts.unet, UNet2DConditionModel, "unet"), (parts.vae, AutoencoderKL, "vae")):
        theirs = kind.from_single_file(
            dict(state), config=str(bases.ROOT / family), subfolder=part, local_files_only=True
        )
        assert same(ours.state_dict(), theirs.state_dict())
    if family != "sd15":
        clip, model = CLIPS[family][-1], parts.text_encoder[-1]
        theirs = convert_open_clip_checkpoint(model, dict(state), prefix=clip.prefixes[0])
        names = {key.removeprefix("text_model."): value for key, value in theirs.items()}
        ours = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(ours[key], names[key]) for key in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_encoded_as_diffusers_pipelines_encode_them(family: Family) -> None:
    parts = random_parts(family)
    rows = parts.text_encoder.encode(CAPTIONS)
    assert [row.tensors["context"].shape[1] for row in rows] == [77, 77, 154]
    # The pipelines cut captions to the first chunk.
    ours = Conditioning.cat([Conditioning({**row.tensors, "context": row.tensors["context"][:, :77]}) for row in rows])
    ours = ours.tensors
    clip_tokenizer().model_max_length = 77  # the pipelines ask for it
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    options = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "device": "cpu"}
    if family == "sdxl":
        pipeline = kind(
            None, parts.text_encoder[0], parts.text_encoder[1], clip_tokenizer(), zero_padding(), parts.unet, None
        )
        context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, **options)
        assert pooled.shape == (3, 16)
        torch.testing.assert_close(ours["pooled"], pooled)
        assert ours["context"].shape == (3, 77, 8 + 16)
    else:
        tokenizer = zero_padding() if family == "sd2" else clip_tokenizer()
        pipeline = kind(
            None, parts.text_encoder[0], tokenizer, parts.unet, None, None, None, requires_safety_checker=False
        )
        context, _ = pipeline.encode_prompt(CAPTIONS, **options)
        assert "pooled" not in ours
    torch.testing.assert_close(ours["context"], context)


def zero_padding() -> object:
    tokenizer = type(clip_tokenizer())(
        vocab=clip_tokenizer().get_vocab(),
        merges=[tuple(line.split(" ")) for line in (REAL / "clip_merges.txt").read_text(encoding="utf-8").splitlines()],
        pad_token="!",
        model_max_length=77,
    )
    assert tokenizer.pad_token_id == 0
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_without_data_everything_has_the_shapes_and_dtypes_that_it_has_with_it(family: Family, tmp_path: Path) -> None:
    base, meta = opened(write(tmp_path / "a.safetensors", to_state(random_parts(family)))), torch.device("meta")

    def shapes(device: torch.device) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
        text_encoder = base.load_text_encoder(device)
        models = base.load(torch.bfloat16, device).network, text_encoder, base.load_autoencoder(device).vae
        return [{name: (each.shape, each.dtype) for name, each in model.named_parameters()} for model in models]

    assert shapes(meta) == shapes(CPU)
    rows = base.load_text_encoder(CPU).encode(["a red circle " * 60, "a red circle " * 60])
    joined, blank = base.collate(rows, Framing.whole(64, 64, 2)).tensors, base.placeholder_conditioning(2, CPU).tensors
    assert {name: each.shape for name, each in joined.items()} == {name: each.shape for name, each in blank.items()}
    assert ("time_ids" in blank) == (family == "sdxl") and base.placeholder_conditioning(2, meta).tensors[
        "context"
    ].is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_trains_all_kinds_of_layer_wherever_they_are(family: Family, tmp_path: Path) -> None:
    model = opened(write(tmp_path / "a.safetensors", to_state(random_parts(family)))).load(FLOAT, CPU)
    layers = model.layers(("all",))
    assert set(map(model.layer_kind, layers)) == set(TARGETS) and layers == model.layers(TARGETS)
    assert len({model.lora_key(layer) for layer in layers}) == len(layers)
    assert not set(model.layers(("attention",))) & set(model.layers(("convolution", "feed_forward")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_names_each_layer_in_every_format(family: Family, tmp_path: Path) -> None:
    state = to_state(random_parts(family))
    checkpoint = opened(write(tmp_path / "a.safetensors", state))
    model, encoder = checkpoint.load(FLOAT, CPU), checkpoint.load_text_encoder(CPU)
    parts = {"unet": model.network} | {
        clip.part: each for clip, each in zip(CLIPS[family], encoder.models(), strict=True)
    }
    layout = next(each for each in lora_layouts() if each.family == family)
    assert layout.shapes.keys() >= set(map(model.lora_key, model.layers(("all",))))
    assert layout.shapes.keys() == layout.peft_names.keys() == layout.stored.keys()
    assert {layout.peft_names[name].partition(".")[0] for name in layout.shapes} == parts.keys()
    for name, shape in layout.shapes.items():
        part, _, path = layout.peft_names[name].partition(".")
        modules = dict(parts[part].named_modules())
        weight = (modules.get(path) or modules[path.removeprefix("text_model.")]).weight
        assert part != "unet" or name in map(kohya_name, model.lora_names(path))
        (stored,) = [each for each in layout.stored[name] if each.name in state]
        assert weight.shape == shape
        assert torch.equal(stored.read(state[stored.name], shape), weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fine_tune_in_half_precision_with_more_in_it_is_the_same_model(
    family: Family, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in to_state(random_parts(family)).items()}
    more = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        CLIPS[family][0].prefixes[0] + "embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.model.logit_scale": torch.ones(()),
        "state_dict": torch.zeros(1),
    }
    plain, merged = (
        load(write(tmp_path / "a.safetensors", state)),
        load(write(tmp_path / "b.safetensors", state | more)),
    )
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(plain, merged, strict=True))
    assert same(to_state(plain), {name: tensor.float() for name, tensor in state.items()})


def test_tensors_that_are_not_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    base = opened(write(tmp_path / "a.safetensors", to_state(random_parts("sd15")) | more))
    with caplog.at_level("INFO"):
        base.load(FLOAT, CPU)
        base.load_text_encoder(CPU)
    assert "a.safetensors: 1 tensors are not part of its sd15 text_encoder, such as cond_stage_model" in caplog.text
    assert "unet" not in caplog.text


def lacks(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def has(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {ldm.UNET_PREFIX + name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks("middle_block.1."), "it lacks 11 blocks, such as middle_block.1"),  # as SSD-1B
        (lacks("output_blocks.0.1.transformer_blocks.9"), "it lacks 1 blocks, such as output_blocks.0.1.transf"),
        (lacks("input_blocks.8."), "it lacks 12 blocks, such as input_blocks.8.0"),
        (
            has("input_blocks.1.0.extra.weight", 1),
            "1 tensors are others, such as model.diffusion_model.input_blocks.1.0.e",
        ),
        (has("label_emb.weight", 10, 64), "1 tensors are others, such as model.diffusion_model.label_emb.weight"),
        (has("out.2.weight", 8, 16, 3, 3), "1 tensors are others, such as model.diffusion_model.out.2.weight"),
    ],
)
def test_another_unet_of_the_same_widths_is_not_taken_for_the_family(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", change(to_state(random_parts("sdxl"))))
    with pytest.raises(bases.UnknownModelError, match=f"another UNet than sdxl.*{message}.* can be distilled"):
        opened(path)


def test_an_lcm_is_no_teacher_for_any_engine(tmp_path: Path) -> None:
    state = has("time_embed.cond_proj.weight", 16, 256)(to_state(random_parts("sd15")))
    folder = save_folder(random_parts("sd15"), tmp_path / "folder")
    edit(folder / "unet", time_cond_proj_dim=256)
    for path in (write(tmp_path / "a.safetensors", state), folder):
        with pytest.raises(UserError, match="is an LCM.* no teacher; use the base that it was made from") as caught:
            open_checkpoint(BaseConfig(path=str(path)))
        assert not isinstance(caught.value, bases.UnknownModelError)


CLIP_LAYER = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1."
UNET_LAYER = ldm.UNET_PREFIX + "middle_block.1.transformer_blocks.0.ff.net.2."


def test_plain_floats_of_8_bits_are_read_as_they_are(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in to_state(random_parts("sd15")).items()}
    base = opened(write(tmp_path / "plain.safetensors", state))
    assert torch.equal(
        base.load(FLOAT, CPU).network.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight,
        state[UNET_LAYER + "weight"].float(),
    )


@pytest.mark.parametrize(
    "more",
    [
        {UNET_LAYER + "scale_weight": torch.ones(())},
        {CLIP_LAYER + "weight_scale": torch.ones(())},
        {CLIP_LAYER + "comfy_quant": torch.zeros(9, dtype=torch.uint8)},
        {UNET_LAYER + "weight.absmax": torch.ones(4)},  # of bitsandbytes
        {UNET_LAYER + "weight": torch.zeros(32, 128, dtype=torch.int8)},
        {CLIP_LAYER + "weight": torch.zeros(16, 8, dtype=torch.uint8)},
        {CLIP_LAYER + "any_factor": torch.ones(())},
        {UNET_LAYER + "any_factor": torch.ones(())},
        {CLIP_LAYER + "weight.any_factor": torch.ones(())},
    ],
)
def test_weights_that_mean_something_else_than_they_say_are_refused(more: dict[str, Tensor], tmp_path: Path) -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in to_state(random_parts("sd15")).items()}
    with pytest.raises(UserError, match=r'base.engine = "comfyui"'):
        opened(write(tmp_path / "a.safetensors", state | more)).load_text_encoder(CPU)


def test_a_vae_with_scales_is_refused(tmp_path: Path) -> None:
    state = to_state(random_parts("sd15"))
    whole = write(tmp_path / "a.safetensors", state)
    vae = {name: tensor for name, tensor in state.items() if name.startswith(ldm.VAE_PREFIX)}
    scaled = write(tmp_path / "vae.safetensors", vae | {ldm.VAE_PREFIX + "decoder.conv_in.scale": torch.ones(())})
    with pytest.raises(
        UserError, match="1 tensors beside the weights of its sd15 vae .* first_stage_model.decoder.conv_in"
    ):
        opened(whole, vae=str(scaled)).load_autoencoder(CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vae_of_its_own_takes_the_place_of_the_models(family: Family, tmp_path: Path) -> None:
    parts = random_parts(family)
    state = to_state(parts)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(ldm.VAE_PREFIX)}
    without = write(tmp_path / "without.safetensors", rest)
    bare = {name.removeprefix(ldm.VAE_PREFIX): state[name] for name in state.keys() - rest.keys()}
    with pytest.raises(UserError, match=r"has no VAE .* set base\.vae"):
        opened(without).check_encoders()
    scale = parts.vae.config.scaling_factor
    parts.vae.register_to_config(scaling_factor=0.5)  # as of another family
    parts.vae.save_pretrained(tmp_path / "folder")
    (published,) = (tmp_path / "folder").glob("*.safetensors")  # the names of diffusers
    old = {rename_as_old_diffusers(name): tensor for name, tensor in load_file(published).items()}
    assert sum("query" in name for name in old) == 4
    for vae in (
        published,
        write(tmp_path / "old.safetensors", old),
        write(tmp_path / "prefixed.safetensors", {ldm.VAE_PREFIX + name: tensor for name, tensor in bare.items()}),
        write(tmp_path / "vae.safetensors", bare),
        write(tmp_path / "b.safetensors", state),
        tmp_path / "folder",
    ):
        base = opened(without, vae=str(vae))
        base.check_encoders()
        assert base.family == family
        loaded = base.load_autoencoder(CPU)
        assert same(loaded.vae.state_dict(), parts.vae.state_dict()) and loaded.scale == scale
    with pytest.raises(UserError, match="there is no model at"):
        opened(without, vae=str(tmp_path / "none.safetensors"))


def rename_as_old_diffusers(name: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("fp16", {}),
        ("bf16", {}),
        ("non_ema", {}),
        ("fp16", {"max_shard_size": "200KB"}),
        (None, {"max_shard_size": "200KB"}),
    ],
)
def test_a_folder_that_has_one_variant_of_its_weights_alone(
    variant: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    parts, folder = random_parts("sd2"), tmp_path / "folder"
    for part, model in (("unet", parts.unet), ("vae", parts.vae), ("text_encoder", parts.text_encoder[0])):
        model.save_pretrained(folder / part, variant=variant, **options)
    assert len(list(folder.rglob("*.safetensors"))) > 8 * len(options)
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(load(folder), parts, strict=True))


def test_shards_with_the_variant_before_their_number(tmp_path: Path) -> None:
    parts, folder = random_parts("sd15"), tmp_path / "folder"
    save_folder(parts, folder)
    shutil.rmtree(folder / "unet")
    parts.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    text = re.sub(r"model(-\d+-of-\d+)", r"model.fp16\1", index.read_text(encoding="utf-8"))
    index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text, encoding="utf-8")
    index.unlink()
    for shard in (folder / "unet").glob("*-of-*"):
        shard.rename(shard.with_name(shard.name.replace("model-", "model.fp16-")))
    assert same(load(folder).unet.state_dict(), parts.unet.state_dict())


@pytest.mark.parametrize("others", [["non_ema"], ["non_ema", "bf16"], [None, "non_ema"]])
def test_of_several_variants_the_usual_one_is_loaded(others: list[str | None], tmp_path: Path) -> None:
    parts, folder = random_parts("sd15"), save_folder(random_parts("sd15"), tmp_path / "folder")
    (plain,) = (folder / "unet").glob("*.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(plain).items()}
    if None not in others:
        plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for variant in filter(None, others):
        save_file(zeros, plain.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    assert same(load(folder).unet.state_dict(), parts.unet.state_dict())


def without_weights(folder: Path, scheduler: dict[str, object] | None = None) -> Path:
    """A folder of SDXL's settings alone, from which a model is recognized."""
    for part, settings in {
        "unet/config": bases.config("sdxl", "unet"),
        "scheduler/scheduler_config": scheduler,
    }.items():
        if settings is not None:
            (folder / part).parent.mkdir(parents=True)
            (folder / f"{part}.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def edit(part: Path, **settings: object) -> None:
    path = part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_layers_per_block": [1, 2, 4]}, r"another UNet.*transformer_layers_per_block is \[1, 2, 4\] in"),
        ({"mid_block_type": None}, "another UNet than sdxl.*mid_block_type is None"),
        ({"attention_head_dim": 8}, "another UNet than sdxl.*attention_head_dim is 8"),
        ({"act_fn": "gelu"}, "another UNet.*act_fn is 'gelu' instead of 'silu'"),
        ({"class_embed_type": "timestep"}, "another UNet.*class_embed_type is 'timestep' instead of None"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "another UNet.*encoder_hid_dim_type"),
        ({"quantization_config": {"load_in_4bit": True}}, "another UNet.*quantization_config"),
        ({"cross_attention_dim": [8, 8]}, "an unknown architecture"),
        ({"_class_name": "UNetMotionModel"}, "has a UNetMotionModel, not a UNet2DConditionModel"),
    ],
)
def test_a_setting_of_a_unet_that_changes_its_prediction_is_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = without_weights(tmp_path)
    edit(folder / "unet", **settings)
    with pytest.raises(UserError, match=message):
        open_checkpoint(BaseConfig(path=str(folder))).load(FLOAT, CPU)


def test_settings_that_change_no_prediction_are_let_be(tmp_path: Path) -> None:
    parts, folder = random_parts("sd15"), save_folder(random_parts("sd15"), tmp_path / "folder")
    same_heads, averages = {"attention_head_dim": [2, 2, 2, 2]}, {"decay": 0.9999, "use_ema_warmup": False}
    spelled = {"only_cross_attention": [False] * 4, "use_linear_projection": None, "num_attention_heads": None}
    edit(folder / "unet", sample_size=96, upcast_attention=True, **same_heads, **averages, **spelled)
    assert same(load(folder).unet.state_dict(), parts.unet.state_dict())


def test_a_tensor_that_a_folder_does_not_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_folder(random_parts("sd15"), tmp_path / "folder")

    def add(part: str, name: str) -> Path:
        (file,) = (folder / part).glob("*.safetensors")
        save_file(load_file(file) | {name: torch.zeros(1)}, file, metadata={"format": "pt"})
        return folder

    with caplog.at_level("INFO"):
        load(add("vae", "loss.logvar"))
    assert "1 tensors are not used, such as loss.logvar" in caplog.text
    with pytest.raises(UserError, match="1 tensors that no weight is for, such as decoder.conv_in.scale"):
        load(add("vae", "decoder.conv_in.scale"))
    with pytest.raises(UserError, match="1 tensors that no weight is for, such as more.weight"):
        load(add("unet", "more.weight"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "has latents_mean, which sd15 has no use for"),
        ({"shift_factor": 0.1}, "has shift_factor, which sd15 has no use for"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "has a AsymmetricAutoencoderKL, not a AutoencoderKL"),
    ],
)
def test_a_vae_of_another_kind_is_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = save_folder(random_parts("sd15"), tmp_path / "folder")
    edit(folder / "vae", **settings)
    with pytest.raises(UserError, match=message):
        opened(folder).load_autoencoder(CPU)


def test_a_quantised_text_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_folder(random_parts("sdxl"), tmp_path / "folder")
    edit(folder / "text_encoder_2", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="text_encoder_2 has quantised weights, as its config.json says"):
        opened(folder).load_text_encoder(CPU)


class MakesFolder:
    """Unpickled by a reader that runs what a pickle asks for, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def damaged_weights(path: Path, _: Path) -> None:
    path.write_bytes(b"no weights")


def no_weights(path: Path, _: Path) -> None:
    path.touch()


def pickled_code(path: Path, made: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": MakesFolder(made)}, protocol=2))


def zipped_code(path: Path, made: Path) -> None:
    torch.save({"weight": MakesFolder(made)}, path)


# A part of a diffusers folder -> the name of its pickled weights.
BINS = {
    "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
    "text_encoder": "pytorch_model.bin",
    "text_encoder_2": "pytorch_model.bin",
}


def test_pickled_weights_that_are_tensors_alone_are_read(tmp_path: Path) -> None:
    parts = random_parts("sdxl")
    folder = save_folder(parts, tmp_path / "folder")
    for part, name in BINS.items():
        (weights,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(weights), folder / part / name)
        weights.unlink()
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(load(folder), parts, strict=True))


@pytest.mark.parametrize("write_bin", [damaged_weights, no_weights, pickled_code, zipped_code])
@pytest.mark.parametrize("part", BINS)
def test_pickled_weights_that_are_anything_else_are_refused(
    part: str, write_bin: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    folder, made = save_folder(random_parts("sdxl"), tmp_path / "folder"), tmp_path / "made"
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    write_bin(folder / part / BINS[part], made)
    base = opened(folder)
    loads = {"unet": lambda: base.load(FLOAT, CPU), "vae": lambda: base.load_autoencoder(CPU)}
    with pytest.raises(UserError, match=rf"not a complete diffusers folder: .*{part}"):
        loads.get(part, lambda: base.load_text_encoder(CPU))()
    assert not made.exists()


def test_the_code_runs_where_nothing_refuses_it(tmp_path: Path) -> None:
    zipped_code(tmp_path / "a.bin", tmp_path / "made")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ([], {}, ("eps", False)),
        (["v_pred"], {}, ("v", False)),
        (["v_pred", "ztsnr"], {}, ("v", True)),
        ([], {"modelspec.prediction_type": "epsilon"}, ("eps", False)),
        ([], {"modelspec.prediction_type": "v"}, ("v", False)),
    ],
)
def test_a_file_says_what_it_predicts_and_from_which_noise(
    family: Family, marks: list[str], metadata: dict[str, str], expected: tuple[str, bool], tmp_path: Path
) -> None:
    state = to_state(random_parts(family)) | {mark: torch.zeros(0) for mark in marks}
    if family == "sd2":
        state[SD2_BIAS] = torch.zeros_like(state[SD2_BIAS])
    found = opened(write(tmp_path / "a.safetensors", state, metadata=metadata or None))
    model = found.load(FLOAT, CPU)
    at_the_end = model.schedule.point(torch.tensor([999])).level
    assert (found.prediction, found.zero_snr) == (model.prediction, at_the_end.alpha.item() == 0) == expected
    assert ("eps is assumed" in " ".join(found.notes)) == (not marks and not metadata and family != "sd2")


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_of_sd2_the_weights_tell_what_it_predicts(spread: float, tmp_path: Path) -> None:
    state = to_state(random_parts("sd2"))
    bias = torch.linspace(-1, 1, len(state[SD2_BIAS]))
    state[SD2_BIAS] = bias * spread / bias.std(unbiased=False)
    path = write(tmp_path / "a.safetensors", state)
    assert opened(path).prediction == ("v" if spread > 0.1 else "eps")
    assert "according to its weights, as ComfyUI" in opened(path).notes[0]
    assert opened(path, prediction="eps").prediction == "eps" and not opened(path, prediction="eps").notes


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"prediction_type": "epsilon"}, ("eps", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", True)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, ("v", False)),
        ({"prediction_type": "sample"}, ("x0", False)),
        (None, ("eps", False)),
    ],
)
def test_a_folder_says_it_in_its_scheduler(
    scheduler: dict[str, object] | None, expected: tuple[str, bool], tmp_path: Path
) -> None:
    found = opened(save_folder(random_parts("sdxl"), tmp_path / "folder", scheduler))
    assert (found.prediction, found.zero_snr) == expected


SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas is \[0.1, 0.2\]"),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2'"),
        ({"beta_end": 0.02}, "beta_end is 0.02"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        # What a class of diffusers takes for a setting that is not there is not Stable Diffusion's.
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler, beta_schedule is 'linear', beta_start is 0.0001"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_end": 0.012}, "beta_schedule is 'linear'"),
    ],
)
def test_a_schedule_that_is_not_stable_diffusions_is_refused(
    scheduler: dict[str, object], message: str, tmp_path: Path
) -> None:
    betas = {} if "_class_name" in scheduler else SD_BETAS
    folder = without_weights(tmp_path, betas | scheduler)
    with pytest.raises(UserError, match=f"another noise schedule than Stable Diffusion's: .*{message}"):
        opened(folder)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_how_a_scheduler_samples_does_not_matter(name: str, tmp_path: Path) -> None:
    sampling = {"timestep_spacing": "trailing", "steps_offset": 1, "use_karras_sigmas": True, "trained_betas": None}
    scheduler = SD_BETAS | sampling | {"_class_name": name, "prediction_type": "epsilon", "clip_sample": True}
    base = opened(without_weights(tmp_path, scheduler))
    assert base.prediction == "eps" and not base.zero_snr
    assert any("its scheduler is LCMScheduler" in note for note in base.notes) == (name == "LCMScheduler")


def test_its_owners_word_counts_more(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", to_state(random_parts("sdxl")))
    model = opened(path, prediction="v", zero_snr="yes").load(FLOAT, CPU)
    alpha_bar = model.schedule.point(torch.tensor([0, 999])).level.alpha.square()
    assert model.prediction == "v" and alpha_bar[1].item() == 0 and alpha_bar[0].item() > 0.99
    marked = write(tmp_path / "b.safetensors", to_state(random_parts("sdxl")) | {"ztsnr": torch.zeros(0)})
    with pytest.raises(UserError, match="to predict eps at zero terminal SNR"):
        opened(marked)
    with pytest.raises(UserError, match="to predict eps at zero terminal SNR"):
        opened(path, zero_snr="yes")
    assert opened(marked, zero_snr="no").prediction == "eps" and opened(marked, prediction="v").zero_snr


@pytest.mark.parametrize("broken", ["conditioner.embedders.1.model.ln_final.weight", "conditioner.embedders.0."])
def test_a_text_encoder_that_is_incomplete_is_named(broken: str, tmp_path: Path) -> None:
    state = {name: each for name, each in to_state(random_parts("sdxl")).items() if not name.startswith(broken)}
    base = opened(write(tmp_path / "a.safetensors", state))
    message = "does not hold a whole sdxl text_encoder_2: 1 of its" if "1." in broken else "has no text encoder"
    with pytest.raises(UserError, match=message):
        base.load_text_encoder(CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_chosen_in_the_order_of_the_unet(family: Family) -> None:
    """The initial weights are drawn in this order, also by the engine that does not know diffusers."""
    suffixes = tuple(f".{kind}" for kind in TARGETS)
    expected = [path for path, _ in bases.empty_unet(family).named_modules() if path.endswith(suffixes)]
    assert len(expected) > 100
    assert chosen_layers(sorted(expected), ["all"]) == expected
