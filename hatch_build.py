"""
Build hook of hatchling: compile the kernels, and put the library into the wheel.

A hook and not scikit-build-core, because the kernels are plain C functions without headers of Python, NumPy or PyTorch: four
calls of a compiler. scikit-build-core would add CMake and ninja to what an installation downloads, a second build backend
(the version, the editable install and RL Zoo's hyperparameters are hatchling's), and a failure of CMake would end the
installation. Here a machine without a compiler gets the package without kernels.

The wheel is for every Python (``py3-none``) and one platform. On Linux that is ``linux_x86_64``: the library is built against
the C library of this machine, and may need its version. A wheel for PyPI is built in a manylinux container, where
``auditwheel repair`` checks which C library is needed and renames the wheel to, for example, ``manylinux_2_28_x86_64``.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

REQUIRE = "SB3_CYBORG_REQUIRE_KERNELS"


class KernelsHook(BuildHookInterface[BuilderConfig]):
    """Compile the kernels before a wheel, editable or not, is written."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """
        :param version: ``standard`` or ``editable``.
        :param build_data: The contents of the wheel. The library and the tag of the platform are added.
        :raises RuntimeError: if the kernels cannot be built and ``SB3_CYBORG_REQUIRE_KERNELS`` is 1.
        """
        kernels = load_build_module(Path(self.root))
        try:
            library = kernels.build()
        except kernels.BuildError as error:
            if os.environ.get(REQUIRE, "0") not in ("", "0"):
                raise RuntimeError(f"{error}. {REQUIRE}=0 installs the package without compiled kernels.") from error
            self.app.display_warning(f"sb3-cyborg is installed without compiled kernels, and works without: {error}")
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")  # git ignores it, the wheel does not
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"


def load_build_module(root: Path) -> ModuleType:
    """
    :param root: The project's folder.
    :return: ``sb3_cyborg.kernels.build``, without an import of ``sb3_cyborg``, which needs PyTorch.
    """
    spec = importlib.util.spec_from_file_location("kernels_build", root / "sb3_cyborg" / "kernels" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def platform_tag() -> str:
    """:return: The platform of a wheel that is built on this machine, e.g. ``linux_x86_64`` or ``macosx_14_0_arm64``."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
