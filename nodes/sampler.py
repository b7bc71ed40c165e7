"""The node that returns a TCD SAMPLER."""

from comfy_api.latest import io

from .eta import eta_input
from .host.sampling import tcd_sampler
from .ranges import check_range


class TCDSampler(io.ComfyNode):
    """Returns the TCD sampler, for SamplerCustom and SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDSampler",
            display_name="TCD Sampler",
            category="sampling/custom_sampling/samplers",
            description=(
                "Strategic stochastic sampling of Trajectory Consistency Distillation (TCD, arXiv 2402.19159), for a "
                "model with a TCD LoRA. Use it with TCD Sigmas and a cfg near 1."
            ),
            inputs=[eta_input()],
            outputs=[io.Sampler.Output(tooltip="For the sampler input of SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, eta: float) -> io.NodeOutput:
        """Return the SAMPLER."""
        check_range("eta", eta, 0.0, 1.0)
        return io.NodeOutput(tcd_sampler(gamma=eta))
