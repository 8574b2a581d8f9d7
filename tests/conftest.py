"""Shared by the tests: where the fixtures outside the repository are, and skipping that is loud and never happens in CI."""

import os

import pytest


def need(condition, why):
    """Skips the test outside CI if `condition` is false; in CI, where everything is there, it fails instead."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
