"""What a result is made with: packages and their versions."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """What the result was made with."""
    packages = {name: version(name) for name in ("litconvert", "torch", "diffusers", "safetensors")}
    return {"python": platform.python_version(), **packages}
