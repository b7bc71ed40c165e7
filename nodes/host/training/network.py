"""A network of the host as the equations of tcd/ use it: predicts x0, on the host's own clock, with an adapter."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import MethodType, TracebackType
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor, nn

from ....tcd import Adapter, AdapterWeights, FlowSchedule, TargetInput, TargetTime, TimePoint
from ....tcd.adapter import OFF, layer_shapes, new_weights
from ...lora_file import LoraFile
from ..lora import with_lora
from ..model_schedule import schedule_of
from ..target_time import with_target_time
from .conditions import Conditioning, ModelConds, equal_rows, model_conds
from .frozen_linear import is_frozen_linear
from .kernels import differentiable_kernels
from .layers import LayerNames
from .recompute import recomputing


class HostNetwork:
    """A frozen model of the host with its schedule and its adapter; as a context manager, it closes itself at the end.

    With the adapter off, it is the model that the host samples from, bit for bit. Latents and conditioning are the
    network's: latents after the host's process_in, one CONDITIONING for each row.
    """

    def __init__(self, patcher: Any, time_layer: str) -> None:
        """Load the host's MODEL into memory, and freeze it.

        time_layer: path, in the diffusion model, of the Linear whose output is the embedding of t. Raises ValueError if
        the host may move weights of the model out of memory while it is used.
        """
        if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
            raise ValueError(
                "the MODEL uses dynamic VRAM, which may move weights out of memory between the forward and the "
                "backward pass: pass model.clone(disable_dynamic=True)"
            )
        with torch.inference_mode(False):
            if patcher.load_device.type != "meta":
                comfy.model_management.load_models_gpu([patcher], force_full_load=True)
            freeze(patcher.model)
            _remove_bound_forwards(patcher.model)
        self.patcher, self.model = patcher, patcher.model
        self.network: nn.Module = patcher.model.diffusion_model
        self.device: torch.device = patcher.load_device
        self.schedule = schedule_of(patcher.get_model_object("model_sampling")).to(self.device)
        if self.device.type == "meta":  # only now, because the schedule is made from the tables' values
            self.model.model_sampling.to(self.device)
        self.adapter = Adapter(self.network, time_layer, is_frozen_linear)
        self.names = LayerNames(self.model)
        self.takes_guidance = takes_guidance(self.network)
        self.one_by_one = False
        """Whether each row is computed in a call of its own, so that the number of calls follows from that of rows."""
        self._undo = ExitStack()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        dtype: torch.dtype = self.model.get_dtype_inference()
        return dtype

    def x0(self, x_t: Tensor, t: TimePoint, conds: Sequence[Conditioning], s: TimePoint | None = None) -> Tensor:
        """Predict x0, float32 [B, C, ...], from x_t [B, C, ...] at t, in the training scale; s: target time.

        conds: B rows of any lengths; their tensors must not be of inference mode (see `to_tensors`). Rows of different
        lengths are computed in separate calls. A guidance scale that is an input of the network is the one in the
        CONDITIONING, or the host's default.

        Raises ValueError if the adapter in use has a target-time embedding and s is None. Networks that work in place,
        such as Flux, have gradients only with `enable_gradient_checkpointing`; otherwise torch raises RuntimeError in
        the backward pass.
        """
        with self._kernels():
            return self._predict(x_t, t, self._rows(conds, x_t, "positive"), s)

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        conds: Sequence[Conditioning],
        unconds: Sequence[Conditioning],
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        """Predict x0 as `x0` does, with guidance scales w [B]; w = 1 is no guidance.

        Where the network takes w as an input, it gets w, and the empty captions are not used. Otherwise the result is
        u + w (c - u), from one call of 2 B rows if the captions have equal lengths. unconds: B rows or one.
        """
        with self._kernels():
            rows = self._rows(conds, x_t, "positive")
            if self.takes_guidance:
                scales = [comfy.conds.CONDRegular(scale.float().view(1)) for scale in guidance]
                rows = [{**row, "guidance": scale} for row, scale in zip(rows, scales, strict=True)]
                return self._predict(x_t, t, rows, s)
            empty = list(unconds) * len(x_t) if len(unconds) == 1 else unconds
            rows += self._rows(empty, x_t, "negative")
            both = self._predict(torch.cat([x_t, x_t]), _twice(t), rows, None if s is None else _twice(s))
            conditional, unconditional = both.chunk(2)
            return unconditional + guidance.view(-1, *[1] * (x_t.ndim - 1)) * (conditional - unconditional)

    @torch.no_grad()
    def x0_as_loaded(self, lora: LoraFile, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint) -> Tensor:
        """Predict x0 of one row as the TCD sampler gets it with a LoRA file that TCDLoraLoader applies.

        The LoRA is added beside all weights, so that none is copied and changed, and the network is as before after the
        call. Raises ValueError if the file does not fit the model.
        """
        x, sigma = self._sampling_scale(x_t, t)
        _, sigma_s = self._sampling_scale(x_t, s)
        with self.adapter.off(), differentiable_kernels():
            inputs = comfy.samplers.cond_cat(self._rows([cond], x_t, "positive"))
            patched = with_lora(self.patcher, lora, 1.0, all_beside=True)
            options = patched.model_options.get("transformer_options", {})
            options = {**options, "wrappers": patched.wrappers, "sigmas": sigma}
            told = with_target_time({"transformer_options": options}, self.schedule, sigma[0], sigma_s[0])
            try:
                patched.patch_model(load_weights=False)
                return self.model.apply_model(x, sigma, **told, **inputs)
            finally:
                patched.unpatch_model(unpatch_weights=False)
                self.patcher.patch_model(load_weights=False)  # what it had before, such as another shift
                _remove_bound_forwards(self.model)

    def new_weights(
        self, layers: Sequence[str], *, rank: int, alpha: float, seed: int, target_input: TargetInput | None = None
    ) -> AdapterWeights:
        """Return trainable adapter weights for the layers at these paths, which initially change nothing.

        target_input: input of an embedding of the target time; None for no embedding. Its sinusoid has the width of the
        network's own, which is the input of the layer before the time layer.
        """
        embedding = None
        if target_input:
            channels, width = _embedding_size(self.network, self.adapter.time_layer)
            embedding = TargetTime.seeded(channels, width, target_input=target_input, seed=seed, device=self.device)
        return new_weights(self.network, layers, rank=rank, alpha=alpha, seed=seed, target_time=embedding)

    def enable_gradient_checkpointing(self) -> None:
        """From now on, recompute activations in the backward pass instead of keeping them."""
        self._undo.enter_context(recomputing(self.adapter))

    def close(self) -> None:
        """Remove the adapter and everything else that was put into the network; its weights stay frozen."""
        self._undo.close()
        self.adapter.eject()

    def __enter__(self) -> "HostNetwork":
        """Return the network itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, also after an exception."""
        self.close()

    def _kernels(self) -> AbstractContextManager[None]:
        # The teacher is computed by the operations that the host samples with.
        return nullcontext() if self.adapter.state == OFF else differentiable_kernels()

    def _rows(self, conds: Sequence[Conditioning], x: Tensor, prompt_type: str) -> list[ModelConds]:
        if len(conds) != len(x):
            raise ValueError(
                f"there are {len(conds)} CONDITIONINGs for {len(x)} rows of latents: give one for each row"
            )
        return [model_conds(self.model, cond, x[i : i + 1], prompt_type) for i, cond in enumerate(conds)]

    def _predict(self, x_t: Tensor, t: TimePoint, rows: Sequence[ModelConds], s: TimePoint | None) -> Tensor:
        """Predict x0 by one call for each group of rows of equal lengths."""
        if s is None and self.adapter.target_time is not None:
            raise ValueError("the adapter has an embedding of the target time: give s")
        x, sigma = self._sampling_scale(x_t, t)
        groups, parts = [[i] for i in range(len(rows))] if self.one_by_one else equal_rows(rows), []
        for group in groups:
            times = None if s is None else (_rows_of(t.network_time, group), _rows_of(s.network_time, group))
            self.adapter.times, level = times, _rows_of(sigma, group)
            options = {**self.patcher.model_options.get("transformer_options", {}), "sigmas": level}
            inputs = comfy.samplers.cond_cat([rows[i] for i in group])
            parts.append(self.model.apply_model(_rows_of(x, group), level, transformer_options=options, **inputs))
        order = [i for group in groups for i in group]
        return _rows_of(torch.cat(parts), sorted(range(len(order)), key=order.__getitem__))

    def _sampling_scale(self, x_t: Tensor, t: TimePoint) -> tuple[Tensor, Tensor]:
        """Return x [B, C, ...] and sigma [B] in the host's scale: variance exploding, except for flows."""
        alpha, sigma = (torch.as_tensor(part) for part in t.level)
        if isinstance(self.schedule, FlowSchedule):
            return x_t, sigma.flatten()
        return x_t / alpha, (sigma / alpha).flatten()


def takes_guidance(network: nn.Module) -> bool:
    """Return whether the guidance scale is an input of a network, as in Flux dev, so that it needs no empty caption."""
    guidance = getattr(network, "guidance_in", None)
    return guidance is not None and any(True for _ in guidance.parameters())


def default_guidance(model: Any) -> float | None:
    """Return the guidance scale that the host gives a network without the node FluxGuidance; None if it is no input.

    model: the host's BaseModel, which may be on the meta device.
    """
    if not takes_guidance(model.diffusion_model):
        return None
    form = model.latent_format
    latent = torch.zeros(1, form.latent_channels, *[1] * (form.latent_dimensions - 2), 8, 8)
    inputs = {"noise": latent, "latent_image": latent, "pooled_output": None, "prompt_type": "positive"}
    scale = model.extra_conds(**inputs, device=latent.device).get("guidance")
    return None if scale is None else float(scale.cond)


def freeze(model: nn.Module) -> None:
    """Freeze all parameters, and make those anew that were made in inference mode, which autograd cannot use.

    Must be called outside of inference mode. One tensor at a time is copied, so memory for one is enough.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_inference():
                setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
            else:
                parameter.requires_grad_(False)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())


def _embedding_size(network: nn.Module, time_layer: str) -> tuple[int, int]:
    """Return the widths of the network's sinusoid and of its embedding of t, whose last Linear is the time layer."""
    shapes, parent = layer_shapes(network), time_layer.rpartition(".")[0]
    width, hidden = shapes[time_layer]
    beside = [shape for path, shape in shapes.items() if path != time_layer and path.rpartition(".")[0] == parent]
    before = [shape[1] for shape in beside if shape[0] == hidden]
    return (before or [hidden])[0], width  # Chroma's time layer gets the sinusoid itself


def _remove_bound_forwards(model: nn.Module) -> None:
    """Undo what the host leaves after it has removed a patch of a module's `forward`: the class's own, as an attribute.

    The adapter refuses a layer whose `forward` is an attribute, because something else may have replaced it.
    """
    for module in model.modules():
        if vars(module).get("forward") == MethodType(type(module).forward, module):
            del module.forward


def _rows_of(tensor: Tensor, rows: list[int]) -> Tensor:
    """Return some rows of a tensor; the CPU would wait until their numbers are copied to a GPU as an index."""
    if rows == list(range(len(tensor))):
        return tensor
    return torch.cat([tensor[row : row + 1] for row in rows])


def _twice(t: TimePoint) -> TimePoint:
    """Repeat B points, so that they fit a batch of 2 B rows."""
    return t.rows(torch.arange(len(t.time), device=t.time.device).repeat(2))
