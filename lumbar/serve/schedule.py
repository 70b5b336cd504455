"""Which members still fit into the time that is left.

May use: nothing of the kit.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping


class Schedule:
    """What the time that is left is enough for.

    views: dict member -> its number of views; weights: dict member -> its weight in the ensemble; hours: the limit, 0
    for none; reserve: hours of it that stay unused; readers: threads that prepare studies; clock: seconds, from
    anywhere; started: the clock when the limit began to run.

    What a member costs is measured while it runs (see note). When the projected end exceeds the limit less the
    reserve, views are dropped first, the last and least useful ones of all members alike; then members: those with the
    most weight stay that are in time for every study, and where none is, the fastest for as many as it can; and when
    not even a batch of that fits, everything. What reading alone takes is not made up by dropping members. The choice
    is made anew for each batch.
    """

    def __init__(
        self,
        views: Mapping[str, int],
        weights: Mapping[str, float],
        hours: float = 9.0,
        reserve: float = 0.5,
        readers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self.views, self.weights, self.readers, self.clock = dict(views), weights, readers, clock
        self.hours, self.limit_s = hours, (hours - reserve) * 3600 if hours > 0 else math.inf
        self.started = clock() if started is None else started
        self.spent: dict[str, deque[tuple[float, int]]] = {}
        self.batches = 0
        self.expected: deque[tuple[float, float]] = deque(maxlen=20)
        self.choice, self.reason = dict(views), ""

    def used_s(self) -> float:
        """Seconds of the limit that have passed."""
        return self.clock() - self.started

    def note(self, step: str, seconds: float, units: int) -> None:
        """A member took `seconds` for `units` studies times views; or for studies "preparing", of which that member's
        inputs apart ("preparing level")."""
        if units:
            self.spent.setdefault(step, deque(maxlen=20)).append((seconds, units))

    def cost_s(self, step: str) -> float:
        """Seconds a unit of late; the first time does not count where there are others: it has loading in it."""
        known = list(self.spent.get(step, ()))
        known = known[1:] or known
        return sum(s for s, _ in known) / max(1e-9, sum(u for _, u in known)) if known else 0.0

    def _network_s(self, choice):
        return sum(self.cost_s(member) * views for member, views in choice.items())

    def _preparing_s(self, choice):
        own = sum(self.cost_s(f"preparing {member}") for member in choice)
        return (self.cost_s("preparing") + own) / self.readers

    def pace_s(self, choice: Mapping[str, int]) -> float:
        """Seconds a study with this choice: what is slower of the networks and of preparing."""
        pace = max(self._network_s(choice), self._preparing_s(choice))
        real, thought = (sum(values) for values in zip(*self.expected, strict=True)) if self.expected else (0, 0)
        return pace * max(1.0, real / thought if thought else 1.0)

    def note_batch(self, seconds: float, studies: int) -> None:
        """A batch took `seconds`: where that is more than the sum of what is measured, projections heed it.

        What was waited for studies that were given up does not belong to it: it says nothing of those to come.
        """
        self.batches += 1
        if self.batches > 1:  # the first one waits for studies that nobody has read ahead
            thought = max(self._network_s(self.choice), self._preparing_s(self.choice)) * studies
            self.expected.append((seconds, thought))

    def plan(self, left: int, batch: int = 1, whole: bool = False) -> dict[str, int]:
        """The choice for the next `batch` of `left` studies: dict member -> number of views, empty for none at all.

        whole: everything or nothing. `.choice` and `.reason` keep it.
        """
        time_s = self.limit_s - self.used_s()
        choice, projected = dict(self.views), left * self.pace_s(self.views)
        if not whole and projected > time_s:
            # Late by how much, then what it is worth, then how many views.
            choice = max(
                self._choices(),
                key=lambda c: (min(0.0, time_s - left * self.pace_s(c)), self._weight(c), sum(c.values())),
            )
        if time_s <= 0 or min(batch, left) * self.pace_s(choice) > time_s:
            choice = {}
        end = (self.used_s() + projected) / 3600
        self.reason = "" if choice == self.views else f"with everything the end would come after {end:.2f} h"
        self.choice = choice
        return choice

    def _choices(self) -> Iterator[dict[str, int]]:
        """All members or some, with all views or the first ones."""
        for most in range(max(self.views.values()), 0, -1):
            for count in range(len(self.views), 0, -1):
                for some in itertools.combinations(self.views, count):
                    yield {member: min(self.views[member], most) for member in some}

    def _weight(self, choice):
        return sum(self.weights.get(member, 0.0) for member in choice)

    def dropped(self) -> list[str]:
        """The last plan's losses, in words."""
        lost = [
            f"{member}: not run" if member not in self.choice else f"{member}: {self.choice[member]} of {views} views"
            for member, views in self.views.items()
            if self.choice.get(member, 0) < views
        ]
        return [f"{what} ({self.reason}, the limit is {self.hours:g} h)" for what in lost]
