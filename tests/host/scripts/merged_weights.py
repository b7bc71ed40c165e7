"""Writes the network of a checkpoint with LoRAs on it, as the trainer's engine on the host's models loads it.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, the checkpoint, the file to write, and
JSON: a list of [path, strength]. Prints an empty JSON object.
"""

import json
import sys

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import torch  # noqa: E402
from load_pack import load_host  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.set_num_threads(1)

if __name__ == "__main__":
    pack, checkpoint, target, loras = sys.argv[1:]
    load_host(pack)
    from some_pack.trainer.config.base import BaseConfig, BaseLora
    from some_pack.trainer.models.comfy.checkpoint import HostCheckpoint

    tables = tuple(BaseLora(path=path, strength=strength) for path, strength in json.loads(loras))
    base = BaseConfig(path=checkpoint, loras=tables, engine="comfyui")
    network = HostCheckpoint(base).load(torch.float32, torch.device("cpu")).network
    save_file({name: value.detach().contiguous() for name, value in network.state_dict().items()}, target)
    json.dump({}, sys.stdout)
