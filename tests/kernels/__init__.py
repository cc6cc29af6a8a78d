"""Tests of the compiled kernels: how they are built, shipped and loaded, and their memory safety."""
