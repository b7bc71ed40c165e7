"""Metadata keys of a TCD LoRA file that are read back when it is used, and the values assumed if a key is absent.

The trainer writes these keys and the nodes read them. Metadata of a safetensors file are strings.
"""

STEPS_KEY = "tcd.steps"
ETA_KEY = "tcd.eta"
CFG_KEY = "tcd.cfg"
TARGET_TIME_KEY = "tcd.target_time"
"""What the file's target-time embedding embeds: "s" or "t-s" (see target_time.TargetInput), or "none" without one."""

DEFAULT_STEPS = 4
DEFAULT_ETA = 0.3
DEFAULT_CFG = 1.0
DEFAULT_TARGET_INPUT = "s"
