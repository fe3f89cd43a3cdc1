"""How many threads make the next tokens.

All cores are the best choice until something else wants them: then the thread that shares its core
is late with every task it takes, and fewer threads are faster. Small models are faster on few
threads anyway. So the number that is in use is compared with half and twice as many, now and then,
and at once when turns suddenly take longer. A trial may be slow, and the next one waits until its
loss has become a fiftieth of the time since, or, while all threads work, a two-hundredth: a core
that is wanted elsewhere shows without a trial, one that is free again does not. The tokens do not
depend on any of this.

A turn makes one token, or guesses some and checks them. Turns of different depths take different
times, so what was seen holds for one depth alone, and a trial is given up where the next burst has
another: it might be left to wait, and meanwhile all bursts would run on so many threads.
"""

SLOWER = 1.3
"""A burst that takes so many times longer per turn than the one before calls for a trial."""
BETTER = 0.95
"""A trial that takes at most this share of the time wins."""
PAUSE = 0.5  # seconds between trials, at least
LOSS_SHARE, LOSS_SHARE_OF_ALL = 50, 200
SHORTEST = 0.008  # seconds of a burst that says anything


class Pace:
    """Chooses among `threads`, half of them, a quarter ... and one; or keeps to it if `fixed`."""

    def __init__(self, threads: int, fixed: bool = False) -> None:
        self._choices = [threads]
        while self._choices[-1] > 1 and not fixed:
            self._choices.append(self._choices[-1] // 2)
        self._best = 0  # index of the choice in use
        self._depth = 0  # of the bursts that were last seen
        self._seconds = [0.0] * len(self._choices)  # a turn of those, when last seen
        self._trial: int | None = None
        self._next_up = False  # which neighbour is tried next
        self._wait = PAUSE

    def choose(self, depth: int = 0) -> int:
        """Threads for the next burst, whose turns guess so many tokens."""
        trial = self._trial if self.trying(depth) else None
        return self._choices[self._best if trial is None else trial]

    def trying(self, depth: int = 0) -> bool:
        """Whether that burst is a trial and should be short."""
        return self._trial is not None and depth == self._depth

    def note(self, turns: int, seconds: float, depth: int = 0) -> None:
        """What the burst took, on as many threads as were chosen."""
        if turns < 1 or seconds < SHORTEST or len(self._choices) == 1:
            return
        if depth != self._depth:
            self._depth, self._trial = depth, None
            self._seconds = [0.0] * len(self._choices)
        each, usual = seconds / turns, self._seconds[self._best]
        if self._trial is not None:
            self._seconds[self._trial] = each
            if each < BETTER * usual:
                self._best = self._trial
            share = LOSS_SHARE if self._best else LOSS_SHARE_OF_ALL
            self._wait = max(PAUSE, share * (seconds - turns * usual))
            self._trial = None
            return
        self._seconds[self._best] = each
        self._wait -= seconds
        if self._wait <= 0 or each > SLOWER * usual > 0:
            self._trial = self._neighbour()

    def _neighbour(self) -> int:
        self._next_up = not self._next_up
        index = self._best - 1 if self._next_up else self._best + 1
        if not 0 <= index < len(self._choices):
            index = 2 * self._best - index
        return index
