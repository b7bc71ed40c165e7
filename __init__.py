"""Entry point of the ComfyUI node pack. Importing it imports nothing of ComfyUI; the nodes load when ComfyUI asks."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import TCDExtension

WEB_DIRECTORY = "./nodes/web"  # its docs/<node>.md is the help page of a node


async def comfy_entrypoint() -> "TCDExtension":
    """Return the extension that lists the pack's nodes; ComfyUI calls this once, when it loads the pack."""
    try:
        from .nodes import TCDExtension
    except Exception:
        # ComfyUI reports an exception from here as one line without a traceback.
        logging.getLogger("trajectory-consistency").exception("The nodes could not be imported")
        raise
    return TCDExtension()
