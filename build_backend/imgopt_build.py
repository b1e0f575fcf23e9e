"""The build backend: scikit-build-core, plus torch as a build requirement where the target environment has none.

A plain `requires = ["torch"]` would fetch a second torch, gigabytes with CUDA, for its headers only; leaving it out
would build without the torch operations. pip runs this hook with the prefix it installs into, so a torch that is
already there is seen through build isolation (uv does not, and gets torch as a requirement).
"""

import os
import sysconfig
from pathlib import Path

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import (
    get_requires_for_build_editable as _editable_requires,
)
from scikit_build_core.build import (
    get_requires_for_build_wheel as _wheel_requires,
)


def _torch_headers() -> list[str]:
    if os.environ.get("IMGOPT_PURE"):
        return []
    places = (Path(sysconfig.get_path(scheme)) / "torch" / "include" for scheme in ("platlib", "purelib"))
    return [] if any(place.is_dir() for place in places) else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_wheel_requires(config_settings), *_torch_headers()]


def get_requires_for_build_editable(config_settings=None):
    return [*_editable_requires(config_settings), *_torch_headers()]
