"""Running estimates of what is measured again and again: round trips, step times, yields."""


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


class Line:
    """Least squares for ``seconds = a + b * tokens`` with b >= 0, in which older samples fade."""

    def __init__(self, fading: float = 0.98) -> None:
        """Multiply the weight of all earlier samples by ``fading`` at each new one."""
        self._fading = fading
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Take one more sample."""
        keep = self._fading
        self._weight = keep * self._weight + 1.0
        self._x = keep * self._x + tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + tokens * tokens
        self._xy = keep * self._xy + tokens * seconds

    @property
    def samples(self) -> float:
        """Faded number of samples."""
        return self._weight

    @property
    def slope(self) -> float:
        """Seconds per token, >= 0; 0 while the samples do not differ enough in tokens to tell."""
        if self._weight == 0.0:
            return 0.0
        mean = self._x / self._weight
        spread = self._xx / self._weight - mean * mean
        if spread < 0.25:
            return 0.0
        return max(0.0, (self._xy / self._weight - mean * self._y / self._weight) / spread)

    def at(self, tokens: float) -> float:
        """Expected seconds for ``tokens``; the samples' mean where the slope is unknown."""
        if self._weight == 0.0:
            return 0.0
        return max(0.0, self._y / self._weight + self.slope * (tokens - self._x / self._weight))


class StepTimes:
    """What a verification step costs: apart for steps without drafts, with drafts, and with full drafts in every row.

    vLLM runs full CUDA graphs only for steps of the last kind, so their times follow a line of their own.
    """

    MIN_SAMPLES = 4.0

    def __init__(self) -> None:
        """Start without samples."""
        self.plain = Line()
        self.drafted = Line()
        self.full = Line()

    def add(self, tokens: int, *, drafts: int, full: bool, seconds: float) -> None:
        """Take one step of ``tokens`` tokens, ``drafts`` of them drafts."""
        line = self.plain if drafts == 0 else self.full if full else self.drafted
        line.add(tokens, seconds)

    @property
    def token_s(self) -> float:
        """Extra seconds of one more token in a step with drafts; 0 while unknown."""
        return self.drafted.slope if self.drafted.samples >= self.MIN_SAMPLES else self.full.slope

    def overhead(self, rows: int, tokens: int, *, full: bool) -> float:
        """How much longer a step with drafts takes than one without: 0.03 is 3 %; 0 while unknown.

        Args:
            rows: Requests in the step.
            tokens: Tokens in the step with drafts.
            full: Whether every row has all the drafts that vLLM takes.
        """
        line = self.full if full and self.full.samples >= self.MIN_SAMPLES else self.drafted
        if min(line.samples, self.plain.samples) < self.MIN_SAMPLES:
            return 0.0
        plain_s = self.plain.at(rows)
        return 0.0 if plain_s <= 0.0 else line.at(tokens) / plain_s - 1.0
