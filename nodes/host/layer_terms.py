"""Add terms to the outputs of layers of the host's model, such as a LoRA or the embedding of the target time.

An object patch replaces the `forward` of a layer. The host applies and undoes it with the model, and it changes neither
weights nor their names, so that a LoRA still finds the layer. The host's own way, BypassInjectionManager, keeps the
layers of the network for which it was made, so a real copy of the model would be without the LoRA. Also, injections are
ejected in the order in which they were injected, so two of them on one layer leave one behind.

All clones of a model share the patch, but some have a network of their own: on another GPU, or loaded anew. The patch
therefore looks up its layer in the network that runs in the current thread, which an APPLY_MODEL wrapper notes.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from comfy.patcher_extension import WrappersMP
from torch import Tensor

NETWORK = "diffusion_model"
"""The attribute of the host's model that is the network."""
_KEY = "tcd_layer_terms"


class ModelCall(NamedTuple):
    """The call of apply_model that runs in the current thread."""

    model: Any
    """The host's model; its network is `model.diffusion_model`."""
    sigma: Tensor
    """[rows], the noise level of each row; all are equal."""
    options: Mapping[str, Any]
    """The transformer_options of the call."""


Term = Callable[[ModelCall, Any, Tensor], Tensor]
"""(call, layer, x) -> the term to add to layer(x), of the output's shape, or broadcast to it."""

_call: ContextVar[ModelCall | None] = ContextVar(_KEY, default=None)  # each thread has its own value


def add_term(model: Any, path: str, term: Term) -> None:
    """Add a term to the output of the layer at `path` in the network; model is a clone, and is changed in place.

    Terms add up. A replacement of the same `forward` that the clone already has is called in place of the layer's own.
    """
    name = f"{NETWORK}.{path}.forward"
    before: Any = model.object_patches.get(name)
    terms: tuple[Term, ...] = (term,)
    if isinstance(before, _ForwardWithTerms):
        before, terms = before.replaced, (*before.terms, term)
    model.add_object_patch(name, _ForwardWithTerms(path, terms, before))
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, _KEY):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, _note_call)


class _ForwardWithTerms:
    """Replaces the `forward` of the layer at a path: its output plus the terms."""

    def __init__(self, path: str, terms: tuple[Term, ...], replaced: Callable[..., Tensor] | None) -> None:
        self.path, self.terms, self.replaced = path, terms, replaced

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = _call.get()
        if call is None:
            raise RuntimeError(
                f"{self.path} has a LoRA that needs the host's apply_model, but the network was called without it, "
                "or without its wrappers, by another node: apply the LoRA after that node, or remove one of the two"
            )
        layer = getattr(call.model, NETWORK).get_submodule(self.path)
        forward = self.replaced or partial(type(layer).forward, layer)
        y: Tensor = forward(x, *args, **kwargs)
        for term in self.terms:
            y = y + term(call, layer, x).to(y.dtype)
        return y


def _note_call(
    executor: Any,
    x: Tensor,
    sigma: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **conditions: Any,
) -> Tensor:
    """Run apply_model, and let the layers that it calls know of the call."""
    options = transformer_options or {}
    token = _call.set(ModelCall(executor.class_obj, sigma, options))
    try:
        result: Tensor = executor(x, sigma, c_concat, c_crossattn, control, options, **conditions)
        return result
    finally:
        _call.reset(token)
