"""The nodes that the pack gives to ComfyUI. Each is a schema and one call: into host/, and from there into tcd/."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .lora import TCDLoraLoader
from .replacements import register_replacements
from .sampler import TCDSampler
from .sampling_setup import TCDSamplingSetup
from .scheduler import TCDSigmas
from .settings import TCDModelSettings


class TCDExtension(ComfyExtension):
    """What the pack's entry point returns to the host."""

    async def on_load(self) -> None:
        """Offer the nodes in place of other packs'; hosts that could use that call this."""
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes; with that, on every host, its lists get TCD too (some hosts never call on_load)."""
        host.register()
        return [TCDSampler, TCDSigmas, TCDLoraLoader, TCDModelSettings, TCDSamplingSetup]
