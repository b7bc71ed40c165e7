"""Finds the layer that embeds t in every network of the host that can be built on the meta device, without weights.

Run by the host's interpreter in the host's folder. Argument: the pack's folder. Prints the layer's path, or null, by
module and class.
"""

import importlib
import inspect
import json
import re
import sys
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.model_base  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from load_pack import load_host  # noqa: E402

DIT = {
    "max_img_h": 8,
    "max_img_w": 8,
    "max_frames": 1,
    "in_channels": 4,
    "out_channels": 4,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 1,
    "num_heads": 2,
    "pos_emb_cls": "rope3d",
}
CHROMA = {
    "in_channels": 4,
    "out_channels": 4,
    "context_in_dim": 8,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 256,
    "n_layers": 2,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
ARGUMENTS = {  # of classes without defaults; those of the stand-ins (families.py) are not repeated here
    "cosmos.predict2.MiniTrainDIT": DIT,
    "anima.model.Anima": DIT,
    "chroma.model.Chroma": CHROMA,
}


def classes() -> dict[str, Any]:
    """Return the classes that comfy.model_base builds its networks of, by module and name."""
    source = inspect.getsource(comfy.model_base)
    found = {}
    for path in set(re.findall(r"unet_model=(comfy\.ldm\.[\w.]+|\w+)\b", source)):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module or "comfy.model_base"), name, None)
        if inspect.isclass(cls):
            found[f"{cls.__module__.removeprefix('comfy.ldm.')}.{name}"] = cls
    return found


def build(name: str, cls: Any) -> Any:
    """Return a network on the meta device, with two blocks if that is an argument; None if it cannot be built."""
    names = inspect.signature(cls.__init__).parameters
    settings = {key: 2 for key in ("num_layers", "n_layers", "layers") if key in names} | ARGUMENTS.get(name, {})
    try:
        with torch.device("meta"):
            return cls(**settings, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)
    except (TypeError, RuntimeError, AssertionError):
        if name in ARGUMENTS:
            raise
        return None


def main() -> None:
    """Print the path in each network that can be built."""
    load_host(sys.argv[1])
    find_time_linear = importlib.import_module("some_pack.nodes.host.time_layer").find_time_linear
    networks = {name: build(name, cls) for name, cls in sorted(classes().items())}
    json.dump({name: find_time_linear(net) for name, net in networks.items() if net is not None}, sys.stdout)


if __name__ == "__main__":
    main()
