"""Node ids that other packs use too: the host keeps the node that was loaded last, and says nothing.

Imported by the running host alone: without a server, as in the trainer, there are no ids.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from server import PromptServer

_OTHERS_INPUTS = {"TCDSampler": {"gamma": "eta"}}
"""The inputs of another pack's node that has the id of ours, and what ours calls them, if both mean the same."""
_log = logging.getLogger("trajectory-consistency")


def warn_of_taken_ids(ours: Iterable[Any]) -> None:
    """Log a warning for each of our nodes whose id a node of another pack has. Packs loaded later are not seen."""
    loaded = sys.modules["nodes"].NODE_CLASS_MAPPINGS  # the host's module, not this package
    for node in ours:
        node_id = node.define_schema().node_id
        taken = loaded.get(node_id, node)
        if taken is not node:
            _log.warning(
                "The node id %s belongs to %s too, and this pack's node replaces the one that was loaded before: to "
                "use that one, disable this pack",
                node_id,
                getattr(taken, "RELATIVE_PYTHON_MODULE", "another pack"),
            )


def accept_others_inputs() -> None:
    """From now on, let prompts that were made for another pack's node of the same id give our node's inputs."""
    PromptServer.instance.add_on_prompt_handler(_rename_inputs)


def _rename_inputs(request: dict[str, Any]) -> dict[str, Any]:
    """Rename the inputs in a request to the host, in place, where ours are absent."""
    for node in request.get("prompt", {}).values():
        inputs = node.get("inputs", {})
        for theirs, ours in _OTHERS_INPUTS.get(node.get("class_type"), {}).items():
            if theirs in inputs and ours not in inputs:
                inputs[ours] = inputs.pop(theirs)
    return request
