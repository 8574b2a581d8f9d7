"""Shared by the tests: skipping for want of a package or a file is loud, and never happens in CI."""

import gc
import os

import pytest


def need(condition, why):
    """Skips the test outside CI if `condition` is false; in CI, where everything is there, it fails instead."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def pytest_collection_finish(session):
    gc.freeze()  # collections of garbage need not go through all that was imported
