"""The node that sets eta for the sampler "tcd" in the stock KSampler."""

from comfy_api.latest import io

from . import host
from .eta import eta_input
from .ranges import check_range


class TCDModelSettings(io.ComfyNode):
    """Stores eta in a model, because nodes that choose a sampler by name have no widget for eta."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDModelSettings",
            display_name="TCD Model Settings",
            category="advanced/model",
            description=(
                "Sets eta for the sampler tcd in KSampler, KSampler (Advanced) and KSamplerSelect, which have no "
                "widget for it; without this node they use 0.3. TCD Sampler has its own eta and ignores this one."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with tcd."),
                eta_input(),
            ],
            outputs=[io.Model.Output(tooltip="The same model, with eta (the paper's gamma) set.")],
        )

    @classmethod
    def execute(cls, model: object, eta: float) -> io.NodeOutput:
        """Return a clone of the model with eta set."""
        check_range("eta", eta, 0.0, 1.0)
        return io.NodeOutput(host.set_eta(model, eta))
