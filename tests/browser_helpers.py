"""Headless Chromium for tests: Debian's program, driven by the pinned Playwright of ``examples/browser``."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "browser"


def require_chromium() -> str:
    """
    Skip the test without node, npm or Chromium, and where Playwright cannot be installed.

    :return: The path of Chromium. The packages of ``examples/browser`` are installed.
    """
    programs = {name: shutil.which(name) for name in ("node", "npm", "chromium")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not (EXAMPLE / "node_modules" / "playwright-core").is_dir():
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=0"]
        result = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"`npm ci` in examples/browser has failed, it needs the npm registry: {result.stderr.strip()[-300:]}")
    return str(programs["chromium"])
