"""The examples in public docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["functional", "modules", "patching.patch", "patching.decide"])
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"hf_rmsnorm.{name}"))
    assert results.attempted and not results.failed


def test_the_packages_own_example() -> None:
    import hf_rmsnorm

    results = doctest.testmod(hf_rmsnorm)
    assert results.attempted and not results.failed
