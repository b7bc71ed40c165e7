"""Writes the networks and the VAE of the workflows whose models are split into several files.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, the folder for the files. Prints, for
each network, the layer that embeds t.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "packs" / "lent_models"))
sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from families import FAMILIES, fill  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from small_networks import QWEN_IMAGE, Z_IMAGE  # noqa: E402

FOLDER = Path(sys.argv[2])
SETTINGS = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
WAN_VAE = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def write(name: str, module: torch.nn.Module) -> None:
    fill(module, seed=0)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, FOLDER / f"{name}.safetensors")


for name in ("flux", "wan"):
    FAMILIES[name].write(FOLDER / f"{name}.safetensors")
write("z-image", NextDiT(**Z_IMAGE, **SETTINGS))
write("qwen-image", QwenImageTransformer2DModel(**QWEN_IMAGE, **SETTINGS))
write("wan-vae", WanVAE(dim=8, **WAN_VAE))
json.dump({name: FAMILIES[name].time_linear for name in ("flux", "z-image", "qwen-image", "wan")}, sys.stdout)
