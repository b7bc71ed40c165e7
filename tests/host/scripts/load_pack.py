"""Code shared by the scripts of this folder, which the host's interpreter runs."""

import importlib.util
import sys
from typing import Any


def load_host(pack: str) -> Any:
    """Import nodes/host under a package name that differs from the folder's, as the host does."""
    spec = importlib.util.spec_from_file_location("some_pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    assert spec and spec.loader
    sys.modules["some_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["some_pack"])
    return importlib.import_module("some_pack.nodes.host")
