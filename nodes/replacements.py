"""Replace other packs' TCD nodes by this pack's, in workflows whose pack is not installed."""

from typing import Any

from comfy_api.latest import ComfyAPI, io


async def register_replacements() -> None:
    """Register the replacements with the host; hosts older than 0.14 have no API for it, and nothing is registered."""
    if not hasattr(io, "NodeReplace"):
        return
    api = ComfyAPI()
    for replacement in (
        _replace_setup(),
        _replace_scheduler(),
        _replace_sampler("SamplerTCD"),
        _replace_sampler("SamplerTCD EulerA"),
    ):
        await api.node_replacement.register(io.NodeReplace(**replacement))


def _replace_setup() -> dict[str, Any]:
    """Replace the node of JettHu/ComfyUI-TCD."""
    return {
        "new_node_id": "TCDSamplingSetup",
        "old_node_id": "TCDModelSamplingDiscrete",
        "old_widget_ids": ["steps", "scheduler", "denoise", "eta"],
        "input_mapping": [_same_input(name) for name in ("model", "steps", "scheduler", "denoise", "eta")],
        "output_mapping": [_same_output(0), _same_output(1), _same_output(2)],
    }


def _replace_scheduler() -> dict[str, Any]:
    """Replace the scheduler of dfl/comfyui-tcd-scheduler and licyk/ComfyUI-TCD-Sampler.

    Their sigmas start below the highest timestep; those of TCDSigmas start at the highest.
    """
    return {
        "new_node_id": "TCDSigmas",
        "old_node_id": "TCDScheduler",
        "old_widget_ids": ["steps"],
        "input_mapping": [_same_input("model"), _same_input("steps"), {"new_id": "denoise", "set_value": 1.0}],
        "output_mapping": [_same_output(0)],
    }


def _replace_sampler(old_node_id: str) -> dict[str, Any]:
    """Replace one of the two samplers of dfl/comfyui-tcd-scheduler, which approximate the TCD sampler."""
    return {
        "new_node_id": "TCDSampler",
        "old_node_id": old_node_id,
        "old_widget_ids": ["gamma"],
        "input_mapping": [{"new_id": "eta", "old_id": "gamma"}],
        "output_mapping": [_same_output(0)],
    }


def _same_input(name: str) -> dict[str, str]:
    return {"new_id": name, "old_id": name}


def _same_output(index: int) -> dict[str, int]:
    return {"new_idx": index, "old_idx": index}
