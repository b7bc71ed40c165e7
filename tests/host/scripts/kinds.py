"""Every model_sampling that the host can build, found by inspecting the host.

The sources are each ModelType, each node that replaces a model's sampling with every combination of its options, and
each sampling class that neither of them uses.
"""

import importlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_sampling as ms
import torch

_REPLACES_SAMPLING = 'add_object_patch("model_sampling"'  # in the source of a node that replaces a model's sampling


def models_of_the_host() -> dict[str, Any]:
    """Return each model_sampling under a name that says where it comes from."""
    found = {f"ModelType {kind.name}": comfy.model_base.model_sampling(_config(), kind) for kind in _types()}
    for file in sorted(Path("comfy_extras").glob("*.py")):
        if _REPLACES_SAMPLING in file.read_text(encoding="utf-8"):
            found |= _of_nodes(importlib.import_module(f"comfy_extras.{file.stem}"))
    used = {cls for model_sampling in found.values() for cls in type(model_sampling).__mro__}
    for cls in vars(ms).values():
        if inspect.isclass(cls) and issubclass(cls, torch.nn.Module) and cls not in used:
            found[f"class {cls.__name__}"] = type("ModelSampling", (cls, ms.EPS), {})()
    return found


def _types() -> Iterator[Any]:
    return iter(comfy.model_base.ModelType)


def _config() -> SimpleNamespace:
    return SimpleNamespace(sampling_settings={})


class _Patcher:
    """A MODEL for a node to patch: a flow model, with noise scale 2 if the host supports it."""

    def __init__(self, made: list[Any]) -> None:
        self.model = SimpleNamespace(model_config=_config())
        self.made = made
        self.model_sampling = comfy.model_base.model_sampling(_config(), comfy.model_base.ModelType.FLOW)
        if hasattr(self.model_sampling, "set_noise_scale"):
            self.model_sampling.set_noise_scale(2.0)
        self.model_options: dict[str, Any] = {}

    def clone(self) -> "_Patcher":
        return self

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def add_object_patch(self, name: str, value: Any) -> None:
        if name == "model_sampling":
            self.made.append(value)


def _of_nodes(module: ModuleType) -> dict[str, Any]:
    """Run each node of a module that replaces the sampling, once for each combination of its options."""
    found = {}
    for name, node in vars(module).items():
        if not (inspect.isclass(node) and node.__module__ == module.__name__ and hasattr(node, "INPUT_TYPES")):
            continue
        own_classes = [cls for cls in node.__mro__ if cls.__module__ == module.__name__]
        if not any(_REPLACES_SAMPLING in inspect.getsource(cls) for cls in own_classes):
            continue
        for chosen in _choices(node.INPUT_TYPES()["required"]):
            made: list[Any] = []
            function = getattr(node if inspect.ismethod(getattr(node, node.FUNCTION)) else node(), node.FUNCTION)
            function(**{"model": _Patcher(made)} | chosen)
            varied = [str(value) for value in chosen.values() if isinstance(value, (str, bool))]
            found[" ".join([name, *varied])] = made[0]
    return found


def _choices(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield input values for a node: every option of a list, both values of a boolean, and the default of the rest."""
    names, values = [], []
    for name, (kind, *rest) in inputs.items():
        if kind == "MODEL":
            continue
        options = rest[0] if rest else {}
        switch = [False, True] if kind == "BOOLEAN" else None
        listed = kind if isinstance(kind, list) else options.get("options")
        names.append(name)
        values.append(listed or switch or [options["default"]])
    for chosen in itertools.product(*values):
        yield dict(zip(names, chosen, strict=True))
