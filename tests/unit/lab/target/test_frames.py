"""What one frame costs: frames are made, decoded and applied."""

import pytest

from vllm_wanspec.lab.target.frames import measure_frames


@pytest.mark.parametrize("sessions", [1, 8])
def test_frames_are_decoded_and_applied(sessions: int) -> None:
    done: list[int] = []
    frames = measure_frames(40, sessions, lambda: done.append(1))
    assert len(frames.times_ns) == 40
    assert len(done) > 40
    assert all(0 < time_ns < 1e9 for time_ns in frames.times_ns)
    assert 64 * 12 < frames.mean_bytes < 64 * 40
