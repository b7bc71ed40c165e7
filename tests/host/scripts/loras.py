"""Applies LoRA files to full-size models whose weights are on the meta device.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, the folder of the LoRAs, and a JSON
list of cases {"model", "lora", "partial"}. Prints JSON: for each case the patches in the host's patcher or the error,
and the number of tensors read; and observations of the cache of tensors.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.ldm.flux.model as flux  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import folder_paths  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

torch.set_num_threads(1)

LDM = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "legacy": False,
}
SD15 = LDM | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "num_heads": 8,
    "context_dim": 768,
    "use_linear_in_transformer": False,
}
SDXL = LDM | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "input_size": None,
    "depth": 2,
    "num_blocks": 2,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    "pos_embed_max_size": 16,
}
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
KNOWN_TO_FLUX = {field.name for field in dataclasses.fields(flux.FluxParams)}  # older hosts have fewer fields
FLUX = {name: value for name, value in FLUX.items() if name in KNOWN_TO_FLUX}
NETWORKS = {
    "SD15": (UNetModel, SD15, comfy.model_base.BaseModel),
    "SDXL": (UNetModel, SDXL, comfy.model_base.SDXL),
    "SD3": (MMDiT, SD3, comfy.model_base.SD3),
    "Flux": (flux.Flux, FLUX, comfy.model_base.Flux),
}


class CountingFile:
    """safetensors' safe_open, but it counts the tensors that are read, and a slice has only its shape."""

    read = 0
    _open = staticmethod(safetensors.safe_open)

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file = self._open(*args, **options)

    def __enter__(self) -> "CountingFile":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> Any:
        return self._file.keys()

    def metadata(self) -> Any:
        return self._file.metadata()

    def get_slice(self, name: str) -> Any:
        return SimpleNamespace(get_shape=self._file.get_slice(name).get_shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        CountingFile.read += 1
        return self._file.get_tensor(name)


@cache
def patcher(name: str) -> Any:
    """Return the host's patcher of a model with weights on the meta device."""
    network, settings, kind = NETWORKS[name]
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    more = {"dtype": torch.float32} if network is flux.Flux else {}
    model.diffusion_model = network(**settings, **more, device="meta", operations=comfy.ops.disable_weight_init)
    model.model_config = type(name, (SimpleNamespace,), {})(unet_config=settings)
    model.model_sampling = SimpleNamespace()  # without a shift
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def import_pack(folder: str) -> Any:
    spec = importlib.util.spec_from_file_location("pack", f"{folder}/__init__.py", submodule_search_locations=[folder])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])
    return importlib.import_module("pack.nodes.host")


def numbers(part: Any) -> Any:
    """Return [shape, first number, sum] of a tensor; any other value is returned unchanged."""
    if not isinstance(part, torch.Tensor):
        return part
    return [list(part.shape), part.flatten()[0].item(), part.double().sum().item()]


def patches(model: Any) -> dict[str, Any]:
    """Return {weight + rows: [strength, whether it is rearranged, up, down, alpha, core, DoRA scale]} of a patcher.

    For a difference, [strength, "diff", the difference].
    """
    return {
        f"{weight}{'' if rows is None else tuple(rows)}": [
            strength,
            *([patch[0]] if isinstance(patch, tuple) else [function is not None]),
            *(numbers(part) for part in (patch[1] if isinstance(patch, tuple) else patch.weights[:5])),
        ]
        for weight, held in model.patches.items()
        for strength, patch, _, rows, function in held
    }


def outcome(host: Any, case: dict[str, Any]) -> dict[str, Any]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("trajectory-consistency").addHandler(handler)
    model = patcher(case["model"])
    before = CountingFile.read
    try:
        lora = host.read_lora(case["lora"])
        patched = host.apply_lora(model, lora, 0.7, allow_partial=case["partial"])
    except (ValueError, OSError) as error:
        read = CountingFile.read - before
        return {"error": str(error), "left alone": not model.patches, "tensors read": read}
    finally:
        logging.getLogger("trajectory-consistency").removeHandler(handler)
    read = CountingFile.read - before
    return {"patches": patches(patched), "log": messages, "left alone": not model.patches, "tensors read": read}


def observe_cache(name: str) -> dict[str, bool]:
    """Read a file's tensors twice, after it was overwritten in place, and after a shorter file replaced it."""
    files = importlib.import_module("pack.nodes.host.lora_files")
    path, lora = Path(files.lora_stamp(name).path), files.read_lora(name)
    first = files.read_tensors(lora)
    numbers = {key: tensor.clone() for key, tensor in first.items()}
    again = files.read_tensors(files.read_lora(name))
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3c")  # 1.0 in half precision
    os.utime(path, ns=(0, 0))
    other = files.read_tensors(files.read_lora(name))
    kept = dict(list(numbers.items())[: len(numbers) // 2])
    safetensors.torch.save_file(kept, path)
    os.utime(path, ns=(0, 0))  # the same time as before: unpacking and copying keep the time of the source
    shorter = files.read_tensors(files.read_lora(name))
    return {
        "reused while the file is unchanged": all(again[key] is tensor for key, tensor in first.items()),
        "read again after the file was overwritten": any(
            not torch.equal(other[key], tensor) for key, tensor in numbers.items()
        ),
        "read again if the size differs at the same time": other.keys() != shorter.keys() == kept.keys(),
        "not changed by overwriting the file": all(torch.equal(first[key], tensor) for key, tensor in numbers.items()),
    }


if __name__ == "__main__":
    folder_paths.folder_names_and_paths["loras"] = ([sys.argv[2]], folder_paths.supported_pt_extensions)
    safetensors.safe_open = safetensors.torch.safe_open = CountingFile
    host = import_pack(sys.argv[1])
    found = [outcome(host, case) for case in json.loads(sys.argv[3])]
    json.dump({"cases": found, "cache": observe_cache("memory.safetensors")}, sys.stdout)
