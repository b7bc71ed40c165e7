"""The pack's ComfyUI nodes. Each is a schema and one call into host/, which calls tcd/."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .distill import TCDDistill
from .lora import TCDLoraLoader
from .lora_model import TCDLoraModelLoader
from .model_settings import TCDModelSettings
from .replacements import register_replacements
from .sampler import TCDSampler
from .sampling_setup import TCDSamplingSetup
from .save_lora import TCDSaveLora
from .sigmas import TCDSigmas


class TCDExtension(ComfyExtension):
    """The extension that the pack's entry point returns to the host."""

    async def on_load(self) -> None:
        """Register replacements for other packs' nodes. Hosts that never call this do not support replacements."""
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, and add TCD to the host's lists; not in on_load, because older hosts never call that."""
        from .host.node_ids import accept_others_inputs, warn_of_taken_ids

        host.register()
        sampling: list[type[io.ComfyNode]] = [
            TCDSampler,
            TCDSigmas,
            TCDLoraLoader,
            TCDModelSettings,
            TCDSamplingSetup,
        ]
        nodes = [*sampling, TCDDistill, TCDSaveLora, TCDLoraModelLoader]
        warn_of_taken_ids(nodes)
        accept_others_inputs()
        return nodes
