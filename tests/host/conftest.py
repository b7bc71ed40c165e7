"""One ComfyUI server for all host tests, and the model files that they load in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import (
    MINI_SD3,
    MINI_SDXL,
    MINI_WAN,
    sd3_transformer,
    sd15_unet,
    sdxl_unet,
    wan_transformer,
    write_sd3_mini,
    write_sd15_mini,
    write_sdxl_mini,
    write_wan_mini,
)
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from graphs import MINI
from stand_ins import StandIns

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK, Host

HERE = Path(__file__).parent

torch.set_num_threads(1)  # leaves a core to the host


@pytest.fixture(scope="session")
def unet() -> UNet2DConditionModel:
    """The network of MINI."""
    return sd15_unet()


@pytest.fixture(scope="session")
def server(
    comfy_host: Host, unet: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    packs = [HERE / "packs" / "tcd_test_pack", HERE / "packs" / "lent_models", PACK / "trainer" / "demo" / "tiny_pack"]
    server = ComfyServer(tmp_path_factory.mktemp("comfy"), packs=packs, host=comfy_host, threads=1)
    write_sd15_mini(server.models / "checkpoints" / MINI, unet)
    with server:
        yield server


@pytest.fixture(scope="session")
def mini_sdxl(server: ComfyServer) -> UNet2DConditionModel:
    """The network of MINI_SDXL, written to the host's checkpoints."""
    unet = sdxl_unet()
    write_sdxl_mini(server.models / "checkpoints" / MINI_SDXL, unet)
    return unet


@pytest.fixture(scope="session")
def mini_sd3(server: ComfyServer) -> SD3Transformer2DModel:
    """The network of MINI_SD3, written to the host's checkpoints."""
    write_sd3_mini(server.models / "checkpoints" / MINI_SD3)
    return sd3_transformer()


@pytest.fixture(scope="session")
def mini_wan(server: ComfyServer) -> WanTransformer3DModel:
    """The network of MINI_WAN, written to the host's checkpoints."""
    write_wan_mini(server.models / "checkpoints" / MINI_WAN)
    return wan_transformer()


@pytest.fixture(scope="session")
def stand_ins(server: ComfyServer, unet: UNet2DConditionModel) -> Iterator[StandIns]:
    """Stand-ins for the files that the workflows name; provide(workflow) must be called before a workflow is used."""
    stand_ins = StandIns(server, unet)
    yield stand_ins
    stand_ins.remove()
