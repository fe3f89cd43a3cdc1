"""How many tokens to guess ahead, none included: whatever makes the most tokens a second.

    tokens of a cycle at depth d = 1 + r (a1 + a1 a2 + ... + a1 ... ad)
    rate(d) = tokens of a cycle / (pace * cost of a cycle)

with r the share of cycles that have drafts at all and ai the share of right drafts at place i,
given that those before were right. Both are learned from every cycle. A depth's cost is relative to
the other depths': a machine's memory may be twice as fast a second later, so seconds of different
times say nothing, and another depth is compared with the bursts right before and after its trial:
medians, since what else runs spoils single bursts. Where those bursts differ, the machine changed
meanwhile, and the trial says nothing. Of each two depths the median of their last comparisons
counts, and the costs are those that fit all pairs best: a depth that came into use because its
trials flattered it must not make the others, compared with it, look cheap as well. Many short
trials say more than a long one, which is in one moment.
The pace, seconds per unit of cost, follows every burst. Whatever a wider batch costs (experts from
disk, a long context) is in the costs. A depth that was never measured is taken to cost what the
first draft did, for each of its drafts.

Measuring a slower depth costs time, so a trial waits until the time since has earned it: trials
lose no more than EARNED of it, PROMISING times that where guesses are right so often that a depth
should pay, and HOPELESS times that where it should make less than POOR of what the one in use does.
The first burst of guesses in a trial warms up, and is not timed: what the block reads is often not
in the caches when it has not run for long. What is learned outlives an answer. Tokens do not depend
on any of this.
"""

import math
import statistics
from typing import Any

import numpy as np

PLACES = 4
EARNED = 0.005
PROMISING, HOPELESS = 4, 0.5
POOR = 0.9
TRIAL_CYCLES = 4
TRIAL_TOKENS = 3
"""Plain tokens of a trial of not guessing."""
BESIDE = 2
"""Bursts before a trial, and as many after it, that it is compared with."""
UNLIKE, UNHEARD = 1.5, 2
"""Bursts beside a trial that differ by more make it worthless, but so many in a row at most."""
TRIALS = 9
"""Comparisons of two depths that count, at most."""
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
CLIP = 2.0
"""A burst that something else disturbed counts as so many times the usual, at most."""


class Depth:
    """The depth of the next burst, from what the bursts before came to."""

    def __init__(self, mode: str) -> None:
        self.fixed: int | None = None
        """Guess so many, whatever pays; for tests and trials."""
        self._least = 1 if mode == "on" else 0
        self._best = self._least
        # of a cycle, where one of the least depth costs 1
        self._cost: list[float | None] = [None] * (PLACES + 1)
        self._pace, self._pace_weight = 1.0, 0.0  # seconds per unit of cost
        # seconds of a cycle in the last bursts, and in those before, of, and after the last trial
        self._last: list[float] = []
        self._before: list[float] = []
        self._during: list[float] = []
        self._after: list[float] = []
        self._tried: int | None = None  # a depth, while the bursts after its trial are awaited
        self._unheard = 0
        # logarithms of a depth's cost relative to that of a smaller one, by the last trials
        self._found: dict[tuple[int, int], list[float]] = {}
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
        self._charged = False

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

    def _guessed_cost(self, depth: int) -> float | None:
        """Of a cycle, from plain decoding alone."""
        plain = self._cost[0]
        return None if plain is None else plain * (1 + FIRST_DRAFT * depth)

    def cost(self, depth: int) -> float | None:
        """Of a cycle, as measured or expected; None before anything was measured."""
        known, plain = self._cost[depth], self._cost[0]
        if known is not None:
            return known
        measured = [d for d in range(1, PLACES + 1) if self._cost[d] is not None]
        if not measured:
            return self._guessed_cost(depth)
        nearest = min(measured, key=lambda d: abs(d - depth))
        base = self._cost[nearest] or 0.0
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
        cost = self.cost(depth)
        return self.tokens(depth) / (cost * self._pace) if cost else 0.0

    def charge(self, seconds: float) -> None:
        """Time that went into getting ready to guess.

        The first time weights may come from disk, which says nothing of later ones.
        """
        plain = self._cost[0]
        if not self._charged and plain is not None:
            seconds = min(seconds, self._pace * plain)
        self._charged = True
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
        if self.fixed is not None:
            return
        self._tokens += tokens
        self._tried_at[depth] = self._tokens
        if self._trial is not None:
            self._note_trial(depth, cycles, tokens, seconds)
            return
        each = seconds / cycles
        if self._cost[depth] is None:
            self._cost[depth] = 1.0
            if depth == 0:
                self._earned += CREDIT * each
        self._learn_cost(each)
        self._learn_pace(depth, cycles, each)
        self._last = [*self._last, each][-BESIDE:]
        self._earned += EARNED * seconds
        self._rested += tokens
        self._settle()
        self._consider_trial()

    def _note_trial(self, depth: int, cycles: int, tokens: int, seconds: float) -> None:
        # what disturbed the trial was not its fault
        lost = min(seconds - tokens / self.rate(self._best), self._loss(depth, cycles))
        self._earned -= max(0.0, lost) / self._patience(depth)
        if not self._warm:
            self._warm = True
            return
        self._trial_left -= cycles
        self._during.append(seconds / cycles)
        if self._trial_left <= 0:
            self._before, self._after, self._last = self._last, [], []
            self._tried, self._trial, self._rested = depth, None, 0

    def _learn_cost(self, each: float) -> None:
        """Of the depth of the last trial, once the bursts after it are known."""
        depth, base = self._tried, self._cost[self._best]
        if depth is None or base is None:
            return
        self._after.append(each)
        if len(self._after) < BESIDE:
            return
        self._tried = None
        beside = self._before + self._after
        if max(beside) > UNLIKE * min(beside) and self._unheard < UNHEARD:
            self._unheard += 1
            return
        self._unheard = 0
        usual = (statistics.median(self._before) + statistics.median(self._after)) / 2
        found = math.log(statistics.median(self._during) / usual)
        known = self._cost[depth]
        if known is not None:
            expected, most = math.log(known / base), math.log(CLIP)
            found = min(max(found, expected - most), expected + most)
        smaller, larger = sorted((depth, self._best))
        earlier = self._found.get((smaller, larger), [])
        self._found[smaller, larger] = [*earlier, found if depth == larger else -found][-TRIALS:]
        self._fit()

    def _fit(self) -> None:
        """Costs from all comparisons, by least squares of their logarithms."""
        system, logarithms = np.zeros((len(self._found) + 1, PLACES + 1)), [0.0]
        system[0, self._least] = 1
        for row, (pair, found) in enumerate(self._found.items(), start=1):
            weight = math.sqrt(len(found))
            system[row, pair] = -weight, weight
            logarithms.append(weight * statistics.median(found))
        fitted = np.linalg.lstsq(system, np.array(logarithms), rcond=None)[0]
        for depth in {depth for pair in self._found for depth in pair}:
            self._cost[depth] = math.exp(fitted[depth])

    def _learn_pace(self, depth: int, cycles: int, each: float) -> None:
        now = each / (self._cost[depth] or each)
        if self._pace_weight:
            now = min(max(now, self._pace / CLIP), self._pace * CLIP)
        self._pace_weight = min(self._pace_weight + cycles, WINDOW)
        self._pace += min(1.0, cycles / self._pace_weight) * (now - self._pace)

    def _settle(self) -> None:
        """Use the best of the depths that have been measured."""
        known = [d for d in range(self._least, PLACES + 1) if self._cost[d] is not None]
        best = max(known, key=self.rate)
        if self._cost[self._best] is None or self.rate(best) > BETTER * self.rate(self._best):
            self._best, self._last, self._tried = best, [], None

    def _consider_trial(self) -> None:
        """Measure another depth, if it promises more or was not looked at for long enough."""
        others = [d for d in range(self._least, PLACES + 1) if d != self._best]
        if self._rested < REST or len(self._last) < BESIDE or self._tried is not None:
            return
        if not self.rate(self._best):
            return
        promising = max(others, key=self.rate)
        unknown = self._cost[promising] is None
        if not (unknown and self.rate(promising) > BETTER * self.rate(self._best)):
            least = POOR * self.rate(self._best)
            near = [d for d in others if d <= 1 or self.rate(d) > least]
            promising = min(near or others, key=lambda d: self._tried_at[d])
        cycles = TRIAL_CYCLES if promising else TRIAL_TOKENS
        if self._earned >= self._loss(promising, 1 + cycles) / self._patience(promising):
            self._trial, self._trial_left = promising, cycles
            self._warm, self._during = promising == 0, []

    def _patience(self, depth: int) -> float:
        """How many times EARNED a trial may lose."""
        cost, best = self._guessed_cost(depth), self.rate(self._best)
        rate = self.tokens(depth) / (cost * self._pace) if cost else best
        if depth and rate < POOR * best:
            return HOPELESS
        return PROMISING if rate > BETTER * best else 1.0

    def _loss(self, depth: int, cycles: int) -> float:
        """Seconds that so many cycles are expected to lose."""
        cost, guessed = self.cost(depth), self._guessed_cost(depth)
        if cost is None:
            return 0.0
        if guessed is not None:
            cost = min(cost, CLIP * guessed)
        return max(0.0, cycles * (cost * self._pace - self.tokens(depth) / self.rate(self._best)))

    def _learn_shares(self, cycles: int, compared: Any, right: Any) -> None:
        share = min(1.0, cycles / WINDOW)
        self._drafting += share * (compared[0] / cycles - self._drafting)
        for place in range(PLACES):
            new, old = int(compared[place]), self._compared[place]
            kept = max(0.0, 1 - new / MEMORY) if old + new > MEMORY else 1.0
            self._compared[place] = kept * old + new
            self._right[place] = kept * self._right[place] + int(right[place])
