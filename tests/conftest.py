"""Shared by the tests: skipping for want of a package or a file is loud, and never happens in CI."""

import os

import pytest


def need(condition, why):
    """Skips the test outside CI if `condition` is false; in CI, where everything is there, it fails instead."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
