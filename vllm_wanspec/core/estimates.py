"""Running estimates of times that are measured again and again: round trips and step times."""


class Smoothed:
    """Exponential moving average that starts at its first sample.

    RFC 6298 smooths round trips with a weight of 1/8; the same serves for step times.
    """

    def __init__(self, weight: float = 0.125) -> None:
        """Give each new sample ``weight`` in (0, 1]."""
        self._weight = weight
        self._value: float | None = None

    def add(self, sample: float) -> None:
        """Take one more sample."""
        self._value = sample if self._value is None else self._value + self._weight * (sample - self._value)

    def get(self, default: float) -> float:
        """The average, or ``default`` before the first sample."""
        return default if self._value is None else self._value
