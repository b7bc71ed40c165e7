"""Entry point of the ComfyUI node pack. To import it imports nothing of the host, which then asks for the nodes."""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import TCDExtension

WEB_DIRECTORY = "./nodes/web"  # docs/<node>.md in it is the node's help page


async def comfy_entrypoint() -> "TCDExtension":
    """Return the extension that lists the pack's nodes; the host calls this once, when it loads the pack."""
    try:
        from .nodes import TCDExtension
    except Exception:
        # Of an entry point that raises, the host prints one line without the place.
        logging.getLogger("trajectory-consistency").exception("The nodes could not be imported")
        raise
    return TCDExtension()
