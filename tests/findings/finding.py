"""Marks tests that state what is right about a known fault: they fail until it is mended, then the mark goes."""

import pytest


def finding(number: str, fault: str) -> pytest.MarkDecorator:
    """Expect an AssertionError, strictly; `number` is the finding's, `fault` says what is wrong today."""
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"finding {number}: {fault}")
