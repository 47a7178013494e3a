"""The servers that the tests run against: real ones only."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """A PostgreSQL in which the tests may do as they like, as a superuser."""
    return os.environ["DBLOCK_TEST_POSTGRES_URL"]
