"""The node that returns the SIGMAS of an N-step TCD run."""

from comfy_api.latest import io

from . import host


class TCDSigmas(io.ComfyNode):
    """Returns the noise levels of an N-step TCD run, or of timesteps that the user types."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema."""
        return io.Schema(
            node_id="TCDSigmas",
            display_name="TCD Sigmas",
            category="sampling/custom_sampling/schedulers",
            description=(
                "Noise levels for TCD Sampler, evenly spaced: among the 50 timesteps (19, 39 ... 999) that TCD LoRAs "
                "are distilled on; for a flow model (SD3, Flux), in its time before the shift; for a model without "
                "timesteps (EDM), in sigma / (1 + sigma). Or at timesteps that you type."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to sample, which gives the sigma at each timestep t."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip=(
                        "The paper's N, the number of steps: 4 gives the timesteps 999, 759, 499 and 259. If the model "
                        "has timesteps, at most 50, because TCD LoRAs are distilled on 50."
                    ),
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "The fraction of the trajectory that is sampled, ending at the clean picture (t = 0), on the "
                        "model's clock. Below 1, the input latent is kept in part; with 0 it is not changed."
                    ),
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    optional=True,
                    tooltip=(
                        "The paper's timesteps tau_N > ... > tau_1, such as 800 or 999,759,499,259. For a flow model, "
                        "1000 times sigma, such as 1000,750.5,500. Steps and denoise are then ignored. If empty, steps "
                        "and denoise determine the timesteps."
                    ),
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="The sigma at each timestep tau_n, and 0 at the end.")],
        )

    @classmethod
    def execute(cls, model: object, steps: int, denoise: float, timesteps: str = "") -> io.NodeOutput:
        """Return the SIGMAS."""
        return io.NodeOutput(host.tcd_sigmas(model, steps=steps, denoise=denoise, timesteps=timesteps))
