"""The node that sets the stochasticity of plain KSampler's sampler `tcd`."""

from comfy_api.latest import io

from . import host
from .eta import eta_input
from .ranges import check_range


class TCDModelSettings(io.ComfyNode):
    """A model that carries the eta which samplers chosen by name have no widget for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return io.Schema(
            node_id="TCDModelSettings",
            display_name="TCD Model Settings",
            category="advanced/model",
            description=(
                "Sets eta for the sampler tcd of KSampler, KSampler (Advanced) and KSamplerSelect, which have no "
                "widget for it. Without this node eta is 0.3 there. TCD Sampler has an eta of its own, and keeps it."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that is to be sampled with tcd."),
                eta_input(),
            ],
            outputs=[io.Model.Output(tooltip="The same model, with eta, gamma, set.")],
        )

    @classmethod
    def execute(cls, model: object, eta: float) -> io.NodeOutput:
        """Return the model with eta set."""
        check_range("eta", eta, 0.0, 1.0)
        return io.NodeOutput(host.set_eta(model, eta))
