"""Measuring: arms, pacing, the WAN proxy, trace recorder, reports."""
