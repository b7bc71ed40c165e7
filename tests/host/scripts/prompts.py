"""Reads prompts with the host's tokenizers of SD1.5, SD2 and SDXL, and encodes them with its text encoders.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, a folder with the weights of each
encoder, LAYOUT-ENCODER.safetensors, and the file prompts.json: the prompts, how many of them are encoded, the layers
from the last (0 is the family's own), and the sizes of each encoder. Writes LAYOUT.safetensors, with context and pooled
of each prompt and layer, and prints the tokens and weights of each prompt by layout and encoder.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import torch  # noqa: E402
from comfy import sd1_clip, sdxl_clip  # noqa: E402
from comfy.text_encoders import sd2_clip  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
LAYOUTS = {
    "sd15": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
    "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
}

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    given = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    found = {}
    for layout, (tokenizer_class, model_class) in LAYOUTS.items():
        tokenizer = tokenizer_class()
        tokens = [tokenizer.tokenize_with_weights(prompt) for prompt in given["prompts"]]
        found[layout] = {encoder: [each[encoder] for each in tokens] for encoder in tokens[0]}
        options = {f"clip_{encoder}_model_config": sizes for encoder, sizes in given["sizes"][layout].items()}
        model = model_class(dtype=torch.float32, model_options=options)
        for encoder in given["sizes"][layout]:
            weights = load_file(folder / f"{layout}-{encoder}.safetensors")
            unknown = getattr(model, f"clip_{encoder}").transformer.load_state_dict(weights, strict=False)[1]
            assert not unknown, unknown
        tensors = {}
        for layer in given["layers"]:
            model.reset_clip_options()
            if layer:
                model.set_clip_options({"layer": -layer})
            for number, each in enumerate(tokens[: given["encoded"]]):
                with torch.no_grad():
                    context, pooled = model.encode_token_weights(each)
                tensors[f"{layer}.{number}.context"], tensors[f"{layer}.{number}.pooled"] = context, pooled
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{layout}.safetensors")
    json.dump(found, sys.stdout)
