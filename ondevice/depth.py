"""How many tokens to guess ahead, none included: whatever makes the most tokens a second.

    tokens of a cycle at depth d = 1 + r (a1 + a1 a2 + ... + a1 ... ad)
    rate(d) = tokens of a cycle / seconds of a cycle

with r the share of cycles that have drafts at all and ai the share of right drafts at place i,
given that those before were right. Both are learned from every cycle, seconds from every burst, so
that whatever a wider batch costs (experts from disk, a long context) is in them. A depth that was
never measured is taken to cost what the first draft did, for each of its drafts.

Measuring a slower depth costs time, so a trial waits until the time since has earned it: trials
lose no more than EARNED of it, or PROMISING times that where guesses are right so often that a
depth should pay. A trial's first burst warms up, and is not timed; what the block reads is often
not in the caches when it has not run for long, so a new trial counts as much as those before. What
is learned outlives an answer. Tokens do not depend on any of
this.
"""

from typing import Any

PLACES = 4
EARNED = 0.005
PROMISING = 4
TRIAL_CYCLES = 4
TRIAL_TOKENS = 16
"""Plain tokens of a trial of not guessing."""
BETTER = 1.02
"""Another depth must promise so much more than the one in use."""
WINDOW = 40
"""Cycles that an average goes back."""
MEMORY = 48
"""Drafts that a share goes back."""
PRIOR, PRIOR_WEIGHT = 0.6, 2.0
"""Share of right drafts before anything was seen, and how many drafts that counts for."""
FIRST_DRAFT = 0.4
"""What the first draft costs, in plain tokens, before it was measured."""
CREDIT = 3.0
"""Plain tokens that trials may lose before anything was earned."""
REST = 32
"""Tokens between two trials, at least."""
SUDDEN, SUDDEN_REST = 1.3, 300
"""Two bursts that take so many times longer or shorter than usual mean that the machine is another
one now: trials get their first credit again, once in so many tokens."""
CLIP = 2.0
"""A burst that something else disturbed counts as so many times the usual, at most."""


class Depth:
    """The depth of the next burst, from what the bursts before came to."""

    def __init__(self, mode: str) -> None:
        self.fixed: int | None = None
        """Guess so many, whatever pays; for tests and trials."""
        self._least = 1 if mode == "on" else 0
        self._best = self._least
        self._seconds: list[float | None] = [None] * (PLACES + 1)  # of a cycle
        self._weight = [0.0] * (PLACES + 1)
        self._right = [PRIOR * PRIOR_WEIGHT] * PLACES
        self._compared = [PRIOR_WEIGHT] * PLACES
        self._drafting = 1.0
        self._trial: int | None = None
        self._trial_left = 0
        self._warm = True
        self._tried_at = [0] * (PLACES + 1)  # in tokens
        self._tokens = 0
        self._rested = 0
        self._earned = 0.0
        self._surprises = 0
        self._surprised_at = 0

    def choose(self) -> int:
        """Tokens to guess in the next burst."""
        if self.fixed is not None:
            return self.fixed
        return self._best if self._trial is None else self._trial

    def cycles(self, tokens: int) -> int:
        """Cycles of the next burst, which should make about so many tokens: a trial is short."""
        depth = self.choose()
        most = max(1, round(tokens / self.tokens(depth)))
        if self.fixed is not None or self._trial is None:
            return most
        return min(most, self._trial_left) if self._warm else 1

    def _guessed_seconds(self, depth: int) -> float | None:
        """Of a cycle, from plain decoding alone."""
        plain = self._seconds[0]
        return None if plain is None else plain * (1 + FIRST_DRAFT * depth)

    def seconds(self, depth: int) -> float | None:
        """Of a cycle, as measured or expected; None before anything was measured."""
        known, plain = self._seconds[depth], self._seconds[0]
        if known is not None:
            return known
        measured = [d for d in range(1, PLACES + 1) if self._seconds[d] is not None]
        if not measured:
            return self._guessed_seconds(depth)
        nearest = min(measured, key=lambda d: abs(d - depth))
        base = self._seconds[nearest] or 0.0
        if plain is None:
            return base
        return max(plain, base + (base - plain) * (depth - nearest) / nearest)

    def tokens(self, depth: int) -> float:
        """Expected tokens of a cycle."""
        total, chance = 0.0, 1.0
        for place in range(depth):
            chance *= self._right[place] / self._compared[place]
            total += chance
        return 1.0 + self._drafting * total

    def rate(self, depth: int) -> float:
        """Expected tokens a second; 0 before anything was measured."""
        seconds = self.seconds(depth)
        return self.tokens(depth) / seconds if seconds else 0.0

    def charge(self, seconds: float) -> None:
        """Time that went into getting ready to guess."""
        self._earned -= seconds

    def note(self, depth: int, tokens: int, seconds: float, figures: Any) -> None:
        """What a burst came to: tokens, seconds, and where tokens were guessed, what was added to
        `Ahead.figures`.
        """
        cycles = int(figures[0]) if depth else tokens
        if tokens < 1 or cycles < 1 or seconds <= 0:
            return
        if depth:
            self._learn_shares(
                cycles, figures[1 : 1 + PLACES], figures[1 + PLACES : 1 + 2 * PLACES]
            )
        self._tokens += tokens
        if self._trial is None:
            self._look_out(depth, seconds / cycles)
        fresh = self._seconds[depth] is None
        if self._trial is None or self._warm:
            self._learn_seconds(depth, cycles, seconds / cycles)
        self._tried_at[depth] = self._tokens
        plain = self._seconds[0]
        if fresh and depth == 0 and plain is not None:
            self._earned += CREDIT * plain
        if self._trial is not None:
            usual = self.rate(self._best)
            if usual:
                # what disturbed the trial was not its fault
                lost = min(seconds - tokens / usual, self._loss(depth, cycles))
                self._earned -= max(0.0, lost) / self._patience(depth)
            if not self._warm:
                self._warm = True
                return
            self._trial_left -= cycles
            if self._trial_left <= 0:
                self._trial, self._rested = None, 0
                self._settle()
            return
        self._earned += EARNED * seconds
        self._rested += tokens
        self._settle()
        self._consider_trial()

    def _look_out(self, depth: int, each: float) -> None:
        """Notice that everything takes longer, or no longer does."""
        usual, plain = self._seconds[depth], self._seconds[0]
        if usual is None or usual / SUDDEN < each < usual * SUDDEN:
            self._surprises = 0
            return
        self._surprises += 1
        if self._surprises == 2 and self._tokens - self._surprised_at > SUDDEN_REST:
            self._surprised_at = self._tokens
            self._weight[depth] = 0.0
            if plain is not None:
                self._earned = max(self._earned, CREDIT * plain)

    def _settle(self) -> None:
        """Use the best of the depths that have been measured."""
        known = [d for d in range(self._least, PLACES + 1) if self._seconds[d] is not None]
        if not known:
            return
        best = max(known, key=self.rate)
        if self._seconds[self._best] is None or self.rate(best) > BETTER * self.rate(self._best):
            self._best = best

    def _consider_trial(self) -> None:
        """Measure another depth, if it promises more or was not looked at for long enough."""
        others = [d for d in range(self._least, PLACES + 1) if d != self._best]
        if self._rested < REST or not self.rate(self._best):
            return
        promising = max(others, key=self.rate)
        unknown = self._seconds[promising] is None
        if not (unknown and self.rate(promising) > BETTER * self.rate(self._best)):
            near = [d for d in others if d <= 1 or abs(d - self._best) == 1]
            promising = min(near, key=lambda d: self._tried_at[d])
        cycles = TRIAL_CYCLES if promising else TRIAL_TOKENS
        if self._earned >= self._loss(promising, 1 + cycles) / self._patience(promising):
            self._trial, self._trial_left, self._warm = promising, cycles, False
            self._weight[promising] = min(self._weight[promising], cycles)

    def _patience(self, depth: int) -> float:
        """How much more than EARNED a trial may lose."""
        seconds = self._guessed_seconds(depth)
        if seconds is None or self.tokens(depth) / seconds <= BETTER * self.rate(self._best):
            return 1.0
        return PROMISING

    def _loss(self, depth: int, cycles: int) -> float:
        """Seconds that so many cycles are expected to lose."""
        seconds, guessed = self.seconds(depth), self._guessed_seconds(depth)
        if seconds is None:
            return 0.0
        if guessed is not None:
            seconds = min(seconds, CLIP * guessed)
        return max(0.0, cycles * (seconds - self.tokens(depth) / self.rate(self._best)))

    def _learn_seconds(self, depth: int, cycles: int, each: float) -> None:
        usual = self._seconds[depth]
        if usual is None:
            self._seconds[depth], self._weight[depth] = each, cycles
            return
        each = min(max(each, usual / CLIP), usual * CLIP)
        self._weight[depth] = min(self._weight[depth] + cycles, WINDOW)
        share = min(1.0, cycles / self._weight[depth])
        self._seconds[depth] = usual + share * (each - usual)

    def _learn_shares(self, cycles: int, compared: Any, right: Any) -> None:
        share = min(1.0, cycles / WINDOW)
        self._drafting += share * (compared[0] / cycles - self._drafting)
        for place in range(PLACES):
            new, old = int(compared[place]), self._compared[place]
            kept = max(0.0, 1 - new / MEMORY) if old + new > MEMORY else 1.0
            self._compared[place] = kept * old + new
            self._right[place] = kept * self._right[place] + int(right[place])
