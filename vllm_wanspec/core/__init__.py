"""Decisions and protocol: pure code that both the live system and a simulator can drive.

Nothing in here does I/O, reads a clock, draws random numbers or starts a thread.
"""
