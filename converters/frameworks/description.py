"""What a file of ours says of its layers. Weights that have none need no Flax."""

import json
from pathlib import Path
from typing import Any

from fwt._types import FileFormatError, Model


def written(module: Any) -> str:
    """The JSON text of a module, or of none."""
    layers = None
    if module is not None:
        from fwt.converters.frameworks import architecture

        layers = architecture.module_to_json(module)
    return json.dumps({"version": 1, "module": layers})


def read(text: str, variables: dict[str, Any], path: Path) -> Model:
    """The model of a description and its variables, every name, setting and shape checked."""
    told = json.loads(text)
    if told["version"] != 1:
        raise FileFormatError(f"{path}: version {told['version']!r}, only 1 is known")
    variables.setdefault("params", {})
    if told["module"] is None:
        return Model(None, variables)
    from fwt.converters.frameworks import architecture

    return architecture.described(told["module"], variables, path)
