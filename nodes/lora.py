"""The node that applies a TCD LoRA to a model. A LoRA that fits in part is refused unless allow_partial is set."""

from comfy_api.latest import io

from . import host
from .lora_inputs import check_strength, model_input, strength_input


class TCDLoraLoader(io.ComfyNode):
    """Applies a LoRA to a model and returns the settings that the file recommends."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema; the host asks for it repeatedly, so the list of files stays current."""
        return io.Schema(
            node_id="TCDLoraLoader",
            display_name="TCD LoRA Loader",
            category="loaders",
            description=(
                "Applies a TCD LoRA, with which a model samples in a few steps. Also returns the steps, eta and cfg "
                "that the file recommends. A file for another architecture is refused."
            ),
            inputs=[
                model_input(),
                io.Combo.Input("lora_name", options=host.lora_names(), tooltip="The file, in models/loras."),
                strength_input(),
                io.Boolean.Input(
                    "allow_partial",
                    default=False,
                    optional=True,
                    tooltip="If only a part of the file fits the model, apply that part. An example is a file that "
                    "also has weights for a text encoder. The log lists what is not applied.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA."),
                io.Int.Output(
                    display_name="steps",
                    tooltip="The recommended number of steps, the paper's N; 4 if the file has none.",
                ),
                io.Float.Output(
                    display_name="eta", tooltip="Recommended eta, the paper's gamma; 0.3 if the file has none."
                ),
                io.Float.Output(
                    display_name="cfg", tooltip="Recommended guidance, the paper's omega; 1.0 if the file has none."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: object) -> object:
        """Return a value that changes if the file does: the host then reruns the node. None for a linked lora_name."""
        return lora_name and host.lora_stamp(lora_name)

    @classmethod
    def execute(
        cls, model: object, lora_name: str, strength_model: float, allow_partial: bool = False
    ) -> io.NodeOutput:
        """Return the model with the LoRA applied, and the recommended settings."""
        check_strength(strength_model)
        lora = host.read_lora(lora_name)
        settings = lora.recommended_settings()
        patched = host.apply_lora(model, lora, strength_model, allow_partial=allow_partial)
        return io.NodeOutput(patched, *settings)
