"""One ComfyUI for all host tests, and the files that they load in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from graphs import MINI
from safetensors.torch import save_file

from trainer.demo.comfy_server import PACK, ComfyServer, Host
from trainer.ldm import unet_to_ldm

HERE = Path(__file__).parent

torch.set_num_threads(1)  # the host has the other core


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    """The smallest UNet that the host takes for SD 1.5: one level, 13.6 M parameters, seeded."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 3  # so that the output is of the size of a real one's
    return unet.requires_grad_(False)


@pytest.fixture(scope="session")
def server(
    comfy_host: Host, unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    packs = [HERE / "packs" / "tcd_test_pack", PACK / "trainer" / "demo" / "tiny_pack"]
    server = ComfyServer(tmp_path_factory.mktemp("comfy"), packs=packs, host=comfy_host, threads=1)
    save_file(unet_to_ldm(unet.state_dict(), unet.config), server.models / "checkpoints" / MINI)
    with server:
        yield server
