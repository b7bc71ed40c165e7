"""What the host puts in place of other packs' TCD nodes, in workflows made with a pack that is not installed."""

from typing import Any

from comfy_api.latest import ComfyAPI, io


async def register_replacements() -> None:
    """Tell the host which nodes take the place of which missing ones; older hosts (before 0.14) know no such thing."""
    if not hasattr(io, "NodeReplace"):
        return
    api = ComfyAPI()
    for replacement in (_setup(), _scheduler(), _sampler("SamplerTCD"), _sampler("SamplerTCD EulerA")):
        await api.node_replacement.register(io.NodeReplace(**replacement))


def _setup() -> dict[str, Any]:
    """JettHu/ComfyUI-TCD."""
    return {
        "new_node_id": "TCDSamplingSetup",
        "old_node_id": "TCDModelSamplingDiscrete",
        "old_widget_ids": ["steps", "scheduler", "denoise", "eta"],
        "input_mapping": [_same(name) for name in ("model", "steps", "scheduler", "denoise", "eta")],
        "output_mapping": [_output(0), _output(1), _output(2)],
    }


def _scheduler() -> dict[str, Any]:
    """dfl/comfyui-tcd-scheduler and licyk/ComfyUI-TCD-Sampler, whose ladder began too low: this one is TCD's."""
    return {
        "new_node_id": "TCDSigmas",
        "old_node_id": "TCDScheduler",
        "old_widget_ids": ["steps"],
        "input_mapping": [_same("model"), _same("steps"), {"new_id": "denoise", "set_value": 1.0}],
        "output_mapping": [_output(0)],
    }


def _sampler(old_node_id: str) -> dict[str, Any]:
    """dfl/comfyui-tcd-scheduler: two approximations of one sampler."""
    return {
        "new_node_id": "TCDSampler",
        "old_node_id": old_node_id,
        "old_widget_ids": ["gamma"],
        "input_mapping": [{"new_id": "eta", "old_id": "gamma"}],
        "output_mapping": [_output(0)],
    }


def _same(name: str) -> dict[str, str]:
    return {"new_id": name, "old_id": name}


def _output(index: int) -> dict[str, int]:
    return {"new_idx": index, "old_idx": index}
