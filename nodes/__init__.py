"""The nodes that the pack gives to ComfyUI. Each is a schema and one call: into host.py, and from there into tcd/."""

from comfy_api.latest import ComfyExtension, io

from .lora import TCDLoraLoader
from .sampler import TCDSampler
from .scheduler import TCDSigmas


class TCDExtension(ComfyExtension):
    """What the pack's entry point returns to the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the pack's nodes."""
        return [TCDSampler, TCDSigmas, TCDLoraLoader]
