"""Metadata keys of a TCD LoRA file, and the defaults for absent keys.

files/metadata.py and nodes/host/model_name.py write these keys. nodes/lora_file.py and `tcd-train sample`
(trainer/commands/sample.py) read them, and refuse a file with an invalid value. All values in the metadata of a
safetensors file are strings.
"""

STEPS_KEY = "tcd.steps"
ETA_KEY = "tcd.eta"
CFG_KEY = "tcd.cfg"
TARGET_TIME_KEY = "tcd.target_time"
"""The input of the file's target-time embedding: "s" or "t-s" (target_time.TargetInput); "none" without one."""
TARGET_TIME_MODULE_KEY = "tcd.target_time.module"
"""The path of the layer to whose output the embedding is added; without it, the network's last Linear that embeds t."""
BASE_LORAS_KEY = "tcd.base_loras"
"""The LoRAs on the base in training, to be loaded too, such as "my-style.safetensors at 0.8, detail.safetensors at 1".

A file without this key was trained on the base alone."""
STRENGTH_KEY = "tcd.strength"
RESOLUTION_KEY = "tcd.resolution"
"""The side, in pixels, of a square with the area of the pictures in training."""
FAMILY_KEY = "tcd.family"
"""ComfyUI's name of the architecture that the file was trained on, such as Flux."""
HOST_FAMILIES = {"sd15": "SD15", "sd2": "SD20", "sdxl": "SDXL"}
"""ComfyUI's names of the families of UNets, by the trainer's."""
SHIFT_KEY = "tcd.shift"
"""The shift of the base's noise schedule, if it has one."""
BASE_FINGERPRINT_KEY = "tcd.base_fingerprint"
"""A hash of the base's file (fingerprint.py)."""
BASE_NAME_KEY = "ss_sd_model_name"
"""The name of the base's file, by kohya's key, which other tools read too."""

DEFAULT_STEPS = 4
DEFAULT_ETA = 0.3
DEFAULT_CFG = 1.0
DEFAULT_TARGET_INPUT = "s"
