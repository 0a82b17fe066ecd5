"""What one frame costs: frames are made, decoded and applied."""

import pytest

from vllm_wanspec.lab.target.frames import measure_frames


@pytest.mark.parametrize("sessions", [1, 8])
def test_frames_are_decoded_and_applied(sessions: int) -> None:
    done: list[int] = []
    frames = measure_frames(40, sessions, lambda: done.append(1))
    assert frames["count"] == 40 < len(done)
    assert 0.0 < frames["us"]["p50"] <= frames["us"]["p99"] < 1e6
    assert 64 * 6 < frames["bytes"] < 64 * 9


def test_no_frame_is_measured_that_nobody_takes() -> None:
    """Their tokens are more than an invented draft model's context holds."""
    assert measure_frames(600)["count"] == 600
