"""The node that applies a LoRA from a graph, without a file."""

from comfy_api.latest import io
from torch import Tensor

from . import host
from .lora_inputs import check_strength, model_input, strength_input
from .lora_types import LoraModel


class TCDLoraModelLoader(io.ComfyNode):
    """Applies a LORA_MODEL to a model and returns the settings that it recommends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDLoraModelLoader",
            display_name="TCD LoRA Model Loader",
            category="model/loaders",
            description=(
                "Applies the LoRA from TCD Distill to a model, without a file, and with its embedding of the target "
                "time. Also returns the steps, eta and cfg to sample with."
            ),
            inputs=[
                model_input(),
                LoraModel.Input("lora", tooltip="The LoRA from TCD Distill."),
                strength_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA."),
                io.Int.Output(display_name="steps", tooltip="The recommended number of steps, the paper's N."),
                io.Float.Output(display_name="eta", tooltip="Recommended eta, the paper's gamma."),
                io.Float.Output(display_name="cfg", tooltip="Recommended guidance, the paper's omega."),
            ],
        )

    @classmethod
    def execute(cls, model: object, lora: dict[str, Tensor], strength_model: float) -> io.NodeOutput:
        """Return the model with the LoRA applied, and the recommended settings."""
        check_strength(strength_model)
        file = host.lora_in_memory(lora)
        return io.NodeOutput(host.apply_lora(model, file, strength_model), *file.recommended_settings())
