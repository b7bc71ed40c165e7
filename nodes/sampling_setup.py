"""The node that combines TCD Sampler, TCD Sigmas and TCD Model Settings."""

from comfy_api.latest import io

from . import host
from .eta import eta_input
from .ranges import check_range


class TCDSamplingSetup(io.ComfyNode):
    """Returns the model, sampler and sigmas of a TCD run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDSamplingSetup",
            display_name="TCD Sampling Setup",
            category="sampling/custom_sampling",
            description=(
                "TCD Sampler, TCD Sigmas and TCD Model Settings in one node: everything that SamplerCustom needs to "
                "sample a model with a TCD LoRA (arXiv 2402.19159)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model with a TCD LoRA, the paper's f_theta."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="The number of steps, the paper's N.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(host.SETUP_SCHEDULERS),
                    tooltip=(
                        "How the timesteps tau_n are chosen. simple is KSampler's scheduler tcd, which takes timesteps "
                        "that TCD LoRAs are distilled on. sgm_uniform is ComfyUI's scheduler of that name."
                    ),
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The fraction of the trajectory that is sampled, ending at the clean picture (t = 0). "
                    "Below 1, the input latent is kept in part.",
                ),
                eta_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with this eta (the paper's gamma) set for KSampler's sampler tcd.",
                ),
                io.Sampler.Output(
                    display_name="SAMPLER",
                    tooltip="TCD's strategic stochastic sampling with this eta (the paper's gamma).",
                ),
                io.Sigmas.Output(display_name="SIGMAS", tooltip="The sigma at each timestep tau_n, and 0 at the end."),
            ],
        )

    @classmethod
    def execute(cls, model: object, steps: int, scheduler: str, denoise: float, eta: float) -> io.NodeOutput:
        """Return the MODEL, the SAMPLER and the SIGMAS."""
        check_range("steps", steps, 1, 1000)
        check_range("denoise", denoise, 0.0, 1.0)
        check_range("eta", eta, 0.0, 1.0)
        sigmas = host.setup_sigmas(model, scheduler, steps=steps, denoise=denoise)
        return io.NodeOutput(host.set_eta(model, eta), host.tcd_sampler(gamma=eta), sigmas)
