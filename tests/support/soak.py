"""What takes long and has shorter brothers in the suite is left to `make soak`."""

from __future__ import annotations

import os
from typing import Any

import pytest

SOAKS = "HOLDFAST_SOAK_S" in os.environ
"""Whether this is `make soak`."""
only_in_soak = pytest.mark.skipif(not SOAKS, reason="a longer case of a test: make soak")


def in_soak(*values: Any) -> Any:
    """A case of a parametrized test that only `make soak` tries."""
    return pytest.param(*values, marks=only_in_soak)
