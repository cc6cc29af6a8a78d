"""Tests. A package, so that nobody else's `tests` on the path comes before it."""
