"""The node that writes a LoRA from a graph to a file."""

from comfy_api.latest import io
from torch import Tensor

from . import host
from .lora_types import LoraModel


class TCDSaveLora(io.ComfyNode):
    """Writes a LoRA with the metadata that TCD LoRA Loader reads, and checks the file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDSaveLora",
            display_name="TCD Save LoRA",
            category="model/training",
            description=(
                "Writes the LoRA from TCD Distill into models/loras, with its recommended settings, and reads the file "
                "back to check it. TCD LoRA Loader lists it then."
            ),
            is_output_node=True,
            inputs=[
                LoraModel.Input("lora", tooltip="The LoRA from TCD Distill."),
                io.String.Input(
                    "filename_prefix",
                    default="tcd-lora",
                    tooltip="Start of the file's name in models/loras, with folders if you like; a number follows.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name in the loaders' lists.")],
        )

    @classmethod
    def execute(cls, lora: dict[str, Tensor], filename_prefix: str) -> io.NodeOutput:
        """Write the file, and return its name."""
        if not filename_prefix.strip():
            raise ValueError("filename_prefix is empty: type the start of the file's name, such as tcd-lora")
        return io.NodeOutput(host.save_lora(lora, filename_prefix))
