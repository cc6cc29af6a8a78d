"""The packages that a result depends on, and their versions."""

from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata

PACKAGES = (
    "sb3-cyborg",
    "stable-baselines3",
    "sb3-contrib",
    "torch",
    "gymnasium",
    "numpy",
    "popgym",
    "minigrid",
    "crafter",
    "minerl",
)
"""Packages whose versions may change what a run computes."""


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """
    :param packages: Names of distributions.
    :return: The versions of those that are installed, by name.
    """
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
