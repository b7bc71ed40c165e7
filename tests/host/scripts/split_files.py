"""Writes the networks and the VAE of the workflows whose models are split into several files.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, the folder for the files. Prints, for
each network, the layer that embeds t.
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "packs"))
sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from families import FAMILIES, fill  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

FOLDER = Path(sys.argv[2])
WAN_VAE = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
NETWORKS = ("flux", "z-image", "qwen-image", "wan")

for name in NETWORKS:
    FAMILIES[name].write(FOLDER / f"{name}.safetensors")
vae = WanVAE(dim=8, **WAN_VAE)
fill(vae, seed=0)
save_file({key: value.contiguous() for key, value in vae.state_dict().items()}, FOLDER / "wan-vae.safetensors")
json.dump({name: FAMILIES[name].time_linear for name in NETWORKS}, sys.stdout)
