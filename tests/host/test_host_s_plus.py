"""LoRAs with a target-time embedding (TCF S+) on stand-ins of every model family, against a computation by hand."""

from typing import Any

import pytest
from run_script import run_script

from trajectory_consistency.trainer.find_comfyui import Host

pytestmark = pytest.mark.host

FAMILIES = ("sd15", "sd3", "flux", "flux-schnell", "flux2", "wan", "hunyuan-video", "ltxv")
KINDS = ("float8", "scaled float8", "nvfp4")
WARNING = "with another sampler it gets the time of the next sigma"

# Networks that have no MLP that embeds t: other models than diffusion models, and some whose embedding has no weights.
WITHOUT = {
    "cascade.stage_b.StageB",
    "cascade.stage_c.StageC",
    "depth_anything_3.model.DepthAnything3Net",
    "minimax_music.dit.MiniMaxMusic3DiT",
    "sam3.detector.SAM3Model",
}
TIME_LINEARS = {
    "ace.model.ACEStepTransformer2DModel": "timestep_embedder.linear_2",
    "anima.model.Anima": "t_embedder.1.linear_2",
    "audio.dit.AudioDiffusionTransformer": "to_timestep_embed.2",
    "aura.mmdit.MMDiT": "t_embedder.mlp.2",
    "boogu.model.BooguTransformer2DModel": "time_caption_embed.timestep_embedder.linear_2",
    "chroma.model.Chroma": "distilled_guidance_layer.in_proj",
    "cogvideo.model.CogVideoXTransformer3DModel": "time_embedding_linear_2",
    "cosmos.predict2.MiniTrainDIT": "t_embedder.1.linear_2",
    "ernie.model.ErnieImageModel": "time_embedding.linear_2",
    "hidream_o1.model.HiDreamO1Transformer": "t_embedder1.mlp.2",
    "hunyuan3d.model.Hunyuan3Dv2": "time_in.out_layer",
    "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain": "t_embedder.mlp.2",
    "hydit.models.HunYuanDiT": "t_embedder.mlp.2",
    "ideogram4.model.Ideogram4Transformer2DModel": "t_embedding.mlp_out",
    "joyimage.model.JoyImageTransformer3DModel": "condition_embedder.time_embedder.linear_2",
    "kandinsky5.model.Kandinsky5": "time_embeddings.out_layer",
    "krea2.model.SingleStreamDiT": "tmlp.2",
    "lens.model.LensTransformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "lightricks.av_model.LTXAVModel": "adaln_single.emb.timestep_embedder.linear_2",
    "lightricks.model.LTXVModel": "adaln_single.emb.timestep_embedder.linear_2",
    "lumina.model.NextDiT": "t_embedder.mlp.2",
    "lumina.model.NextDiTPixelSpace": "t_embedder.mlp.2",
    "mage_flow.model.MageFlowTransformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "minimax.model.MiniMaxH3Model": "time_embedder.proj_out",
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": "t_embedder.mlp.2",
    "omnigen.omnigen2.OmniGen2Transformer2DModel": "time_caption_embed.timestep_embedder.linear_2",
    "pixeldit.model.PixDiT_T2I": "t_embedder.mlp.2",
    "pixeldit.pid.PidNet": "t_embedder.mlp.2",
    "qwen_image.model.QwenImageTransformer2DModel": "time_text_embed.timestep_embedder.linear_2",
    "triposplat.model.LatentSeqMMFlowModel": "t_embedder.mlp.2",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s-plus"))


@pytest.fixture(scope="module")
def measured(comfy_host: Host, files: str) -> dict[str, Any]:
    return run_script(comfy_host, "s_plus.py", files, *FAMILIES, timeout_s=600)


@pytest.fixture(scope="module")
def ways(comfy_host: Host, files: str) -> dict[str, Any]:
    return run_script(comfy_host, "s_plus_ways.py", files, timeout_s=600)


@pytest.fixture(scope="module")
def quantized(comfy_host: Host, files: str) -> dict[str, Any]:
    return run_script(comfy_host, "quantized.py", files, timeout_s=600)


# Every family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_samples_what_is_computed_by_hand(measured: dict[str, Any], family: str) -> None:
    found = measured[family]
    assert len(found["grid"]) == 18
    assert max(found["grid"].values()) < 1e-5
    assert found["image to image"] < 1e-5
    assert found["effect of the embedding"] > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_model_give_equal_bits_and_the_plain_model_stays(measured: dict[str, Any], family: str) -> None:
    found = measured[family]
    assert found["clone equal"] and found["real copy equal"] and found["again equal"]
    assert found["the copy has a network of its own"]
    assert found["plain equal"]
    assert found["nothing is drawn"], "the global random generator must not move"


def test_the_layer_that_embeds_t_is_found(comfy_host: Host) -> None:
    found = run_script(comfy_host, "time_layers.py", timeout_s=600)
    wan = {name: "time_embedding.2" for name in found if name.startswith("wan.")}
    assert len(wan) > 5
    expected = TIME_LINEARS | wan | dict.fromkeys(WITHOUT)
    assert found == {name: path for name, path in expected.items() if name in found}


# The times


@pytest.mark.parametrize(
    ("family", "times"), [("sd15", [759.0, 499.0, 259.0, 0.0]), ("sd3", [900.0, 750.0, 500.0, 0.0])]
)
def test_another_sampler_gets_the_time_of_the_next_level(ways: dict[str, Any], family: str, times: list[float]) -> None:
    found = ways["another sampler"][family]
    assert found["euler"] < 1e-5
    assert [WARNING in message for message in found["warnings"]] == [True]
    for rounded in ("handed", "above", "below", "half", "bfloat16"):
        assert found[rounded] == pytest.approx(times, rel=1e-6), rounded


def test_a_model_without_timesteps_gets_thousandths_of_flow_time(ways: dict[str, Any]) -> None:
    found = ways["continuous"]
    expected = [1000 * sigma / (1 + sigma) for sigma in found["sigmas"][1:]]
    assert found["handed"] == pytest.approx(expected, rel=1e-5)
    assert found["another"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_context_windows(ways: dict[str, Any], family: str, batch: int, length: int, cfg: float) -> None:
    error, rows = ways["context windows"][family][f"{batch} {length} {cfg}"]
    assert error < 1e-5
    assert length * int(cfg) in rows, "a window has fewer rows than the batch"


def test_split_schedules(ways: dict[str, Any]) -> None:
    assert max(ways["split"].values()) < 1e-5


def test_a_time_for_each_frame(ways: dict[str, Any]) -> None:
    assert ways["a time per frame"] < 1e-5


# The layer


def test_copies_on_several_gpus_run_at_once(ways: dict[str, Any]) -> None:
    assert all(ways["copies"].values()), ways["copies"]


def test_what_else_is_on_the_layer_stays_in_effect(ways: dict[str, Any]) -> None:
    found = ways["other packs"]
    assert found["bypass"] < 1e-5 < 0.05 < found["bypass matters"]
    assert found["a replaced forward"] < 1e-5 < 0.05 < found["which matters"]
    assert found["wrappers"]
    assert found["hooks of the conditioning"] < 1e-5
    assert found["compiled"] < 1e-5
    assert found["plain equal"]


def test_a_file_names_the_layer(ways: dict[str, Any]) -> None:
    assert ways["places"]["named"] < 1e-5


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("width", "has the width 130, but the model's own, of t, has 128 (t_embedder.mlp.2)"),
        ("no such layer", "is for the layer 'time_embed.2', which is not a Linear of this model"),
        ("no Linear", "is for the layer 't_embedder', which is not a Linear of this model"),
        ("the network", "is for the layer '', which is not a Linear of this model"),
        ("unknown network", "use a file that names the layer, in its metadata tcd.target_time.module"),
        ("knows no noise", "needs network times, and a model that knows no noise has none"),
    ],
)
def test_an_embedding_without_a_place_is_refused(ways: dict[str, Any], reason: str, message: str) -> None:
    refusal = ways["places"]["refusals"][reason]
    assert message in refusal and "nothing was applied" in refusal


def test_a_network_that_is_called_without_the_host_is_refused(ways: dict[str, Any]) -> None:
    assert "t_embedder.mlp.2 has a LoRA that needs the host's apply_model" in ways["places"]["called directly"]


# Quantised weights


@pytest.mark.parametrize(
    "weights", [f"{kind} {family}" for kind in KINDS for family in ("flux", "wan")] + ["float8 sd15"]
)
def test_a_lora_is_added_beside_quantised_weights(quantized: dict[str, Any], weights: str) -> None:
    found = quantized[weights]
    assert found["beside"] < 1e-5 and found["lora alone"] < 1e-5
    assert found["patched"] > 0.02, "rounded to the weight's bits"
    assert not found["warnings"]
    assert found["clone equal"] and found["real copy equal"] and found["plain equal"]
    assert found["kept on the device"] == 0, "copies are dropped after a run"


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_lora_on_8_bit_integers_is_patched_and_counted(quantized: dict[str, Any], family: str) -> None:
    found = quantized[f"int8 {family}"]
    (warning,) = found["warnings"]
    assert f"is rounded in {26 if family == 'flux' else 20} of its layers: " in warning
    assert found["lora alone"] == found["patched"] < 0.05
    assert found["clone equal"] and found["real copy equal"] and found["plain equal"]


def test_parts_of_a_fused_weight_and_two_files(quantized: dict[str, Any]) -> None:
    assert quantized["slices"] < 1e-5
    assert quantized["two files"] < 1e-5


def test_a_dora_is_patched_and_named(quantized: dict[str, Any]) -> None:
    (warning,) = quantized["dora"]
    assert "is rounded in 1 of its layers: joint_blocks.0.x_block.attn.qkv. " in warning
