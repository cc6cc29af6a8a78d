"""Fixtures of a C++ compiler and of the library of kernels."""

from pathlib import Path

import pytest

from sb3_cyborg.kernels.build import BuildError, build, find_compiler


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    """:return: The C++ compiler as a command. Tests that need one are skipped where there is none."""
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def library(compiler: list[str]) -> Path:
    """:return: The library of the checkout, built from the present sources. A failure of the compiler is an error."""
    return build()
