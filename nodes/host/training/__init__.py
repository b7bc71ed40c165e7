"""Train an adapter on a model that the host has loaded: the network with gradients, and its conditioning.

Needs torch and the host only, so that a node in a graph and the trainer can both use it.
"""

from .conditions import READ_BY_HOST, from_tensors, to_tensors
from .kernels import differentiable_kernels
from .network import HostNetwork
from .recompute import recomputing
from .trainable import known_distillation, time_layer_of

__all__ = [
    "READ_BY_HOST",
    "HostNetwork",
    "differentiable_kernels",
    "from_tensors",
    "known_distillation",
    "recomputing",
    "time_layer_of",
    "to_tensors",
]
