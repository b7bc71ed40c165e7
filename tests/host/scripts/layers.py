"""Measures tcd.Adapter beside the host's own layers: plain, cast when they are used, and quantised.

Run by the host's interpreter in the host's folder. Argument: the pack's folder. Prints, by layer, the relative error of
the LoRA's term, and whether both of its halves have a gradient.
"""

import importlib
import json
import sys

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from load_pack import load_host  # noqa: E402
from torch import nn  # noqa: E402


def quantised(dtype: torch.dtype) -> nn.Module:
    """A Linear of the host's mixed precision, which is no nn.Linear, with a weight in 8 bits."""
    layer = comfy.ops.mixed_precision_ops({}, dtype).Linear(64, 32, device="cpu", dtype=dtype)
    scale, format = torch.tensor(0.01), json.dumps({"format": "float8_e4m3fn"}).encode()
    weight = (torch.randn(32, 64) / scale).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale, "bias": torch.zeros(32, dtype=dtype)}
    layer.load_state_dict(state | {"comfy_quant": torch.tensor(list(format), dtype=torch.uint8)})
    assert not isinstance(layer, nn.Linear)
    return layer


def measure(layer: nn.Module, x: torch.Tensor) -> tuple[float, bool]:
    network = nn.ModuleDict({"layer": layer}).requires_grad_(False)
    adapter = lora.Adapter(network, "layer")
    weights = adapter.add(lora.STUDENT, lora.new_weights(network, ["layer"], rank=3, alpha=6.0, seed=0))
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    y = network["layer"](x)
    with adapter.off():
        term = (y - network["layer"](x)).double()
    (down, up), ndim = (each.detach().double() for each in weights.parameters()), x.ndim
    merged = 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    product = nn.functional.linear if ndim == 2 else nn.functional.conv2d if ndim == 4 else nn.functional.conv3d
    expected = product(x.double(), merged, None, *(() if ndim == 2 else (layer.stride, layer.padding)))
    y.float().square().sum().backward()
    return ((term - expected).norm() / expected.norm()).item(), all(bool(p.grad.any()) for p in weights.parameters())


load_host(sys.argv[1])
lora = importlib.import_module("some_pack.tcd.adapter")
torch.manual_seed(0)
found = {}
for kind, operations, dtype in (
    ("plain", comfy.ops.disable_weight_init, torch.float32),
    ("cast", comfy.ops.manual_cast, torch.float8_e4m3fn),
):
    shapes = {"Linear": (2, 6), "Conv2d": (2, 6, 9, 9), "Conv3d": (2, 6, 3, 5, 5)}
    for name, shape in shapes.items():
        options = {} if name == "Linear" else {"kernel_size": 3, "stride": 2, "padding": 1}
        layer = getattr(operations, name)(6, 8, **options)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape).to(dtype)
        found[f"{kind} {name}"] = measure(layer, torch.randn(shape))
if hasattr(comfy.ops, "mixed_precision_ops"):
    found["quantised Linear"] = measure(quantised(torch.float32), torch.randn(2, 64))
json.dump(found, sys.stdout)
