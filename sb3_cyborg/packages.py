"""The packages that a result depends on, and their versions."""

import re
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


REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+).*\bextra == ['"](?P<extra>[\w-]+)['"]""")
"""A requirement of an extra, as a distribution's metadata has it: ``popgym[navigation]>=1.0.7; extra == 'envs'``."""


def missing_packages(package: str, extra: str) -> list[str]:
    """
    :param package: Name of a distribution that is installed.
    :param extra: Name of one of its extras.
    :return: The requirements of the extra that are not installed. Versions, conditions on the platform, and extras of the
        requirements are not looked at.
    :raises importlib.metadata.PackageNotFoundError: if the distribution is not installed.
    """
    requirements = filter(None, map(REQUIREMENT.match, metadata.requires(package) or []))
    names = [match["name"] for match in requirements if match["extra"] == extra]
    return [name for name in names if not package_versions([name])]
