"""The host's types for training nodes, as its own TrainLoraNode has them."""

from comfy_api.latest import io

LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
