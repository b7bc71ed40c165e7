"""A ComfyUI pack for the tests: nodes that pass values in and out of the host where its stock nodes cannot."""

import torch


class TestConditioning:
    """A CONDITIONING of seeded noise, for checkpoints without a text encoder; a new salt avoids the host's cache.

    width: numbers per token. pooled: size of the pooled vector, 0 for none.
    """

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {
            "required": {"seed": ("INT", {"default": 0}), "salt": ("STRING", {"default": ""})},
            "optional": {"width": ("INT", {"default": 768}), "pooled": ("INT", {"default": 0})},
        }

    def make(self, seed, salt, width=768, pooled=0):
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, 77, width, generator=generator)
        vector = torch.randn(1, pooled, generator=generator)
        return ([[embedding, {"pooled_output": vector} if pooled else {}]],)


class TestShow:
    """An output node whose `values` and `shape` are those of the linked value; a new salt avoids the host's cache."""

    RETURN_TYPES = ()
    FUNCTION = "show"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": ("*",), "salt": ("STRING", {"default": ""})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802, tells the host to accept a link of any type
        return True

    def show(self, value, salt):
        if isinstance(value, list):  # a CONDITIONING
            value = value[0][0]
        value = torch.as_tensor(value, dtype=torch.float64)
        return {"ui": {"values": value.flatten().tolist(), "shape": list(value.shape)}}


class TestFloat:
    """A FLOAT parsed from a text such as "nan", for linking to an input."""

    RETURN_TYPES = ("FLOAT",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"text": ("STRING", {"default": ""})}}

    def make(self, text):
        return (float(text),)


class TestInt(TestFloat):
    """An INT parsed from a text, for linking to an input."""

    RETURN_TYPES = ("INT",)

    def make(self, text):
        return (int(text),)


class TestCastLatent:
    """The LATENT converted to a dtype, such as float16."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "cast"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"samples": ("LATENT",), "dtype": ("STRING", {"default": ""})}}

    def cast(self, samples, dtype):
        return (samples | {"samples": samples["samples"].to(getattr(torch, dtype))},)


NODES = (TestConditioning, TestShow, TestFloat, TestInt, TestCastLatent)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
