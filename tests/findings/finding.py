"""Marks a test that states what is right about a known fault: it fails until the fault is mended, then the mark goes."""

import pytest


def finding(number: str, fault: str) -> pytest.MarkDecorator:
    """Expect the test to fail with an AssertionError, strictly; `number` is the finding's, `fault` says what is wrong today."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"finding {number}: {fault}")
