"""Convert a workflow, as the browser saves it, to a prompt for the host."""

from collections.abc import Mapping
from typing import Any

SIZE = 64
_PIXELS = {"width": SIZE, "height": SIZE}
_IN_PIXELS = ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyHunyuanLatentVideo", "ImageScale")
_TRAINING = {"training_steps": 2, "batch": 2, "accumulate": 1, "rank": 2, "per_prompt": 1, "preview_every": 1}
SMALL: Mapping[str, Mapping[str, int]] = {**dict.fromkeys(_IN_PIXELS, _PIXELS), "TCDDistill": _PIXELS | _TRAINING}
"""By type of node: the values with which the tests run a workflow, which is otherwise as in its file."""

NOTES = {"Note", "MarkdownNote"}  # nodes that exist only in the browser
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def api_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a saved workflow to a prompt, as the browser does when the workflow is run."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"]}
            typed = widget_values(node, object_info[node["type"]])
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": typed | linked}
    return prompt


def widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the widget values of a node: the saved ones in order, and defaults for widgets that were added later."""
    values = iter(node["widgets_values"])
    found = {}
    for name, (kind, *rest) in inputs_of(info).items():
        options = rest[0] if rest else {}
        if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
            found[name] = next(values) if "default" not in options else next(values, options["default"])
            if options.get("control_after_generate"):
                assert next(values) in {"fixed", "increment", "decrement", "randomize"}
            if options.get("image_upload"):
                assert next(values) == "image", "the upload button is a widget too"
    assert list(values) == [], f"{node['type']} has more values than widgets"
    return found


def inputs_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a node by name, as the host describes them."""
    return info["input"].get("required", {}) | info["input"].get("optional", {})
