"""Whether a market's forecasts have become worse: a sequential test on the loss of each day. Pure.

The p-value of a day is the rank of its loss among those before it. Were the days exchangeable, p-values would be
independent and uniform, and the Shiryaev-Roberts sum R = (R + 1) * f(p) of a bet f with mean 1 would have the mean n
after n days. So the mean time until R reaches FALSE_ALARM_DAYS is at least that many days: one false alarm per market
in ten years (Vovk et al. 2021, "Retrain or not retrain"). Small p-values, that is large losses, let R grow.
"""

from bisect import bisect_left, insort
from math import sqrt

from msgspec import Struct

FALSE_ALARM_DAYS = 3650
LEAST_DAYS = 14  #: of losses, before a day is judged
MOST_DAYS = 364  #: of losses that are kept


class Drift(Struct):
    """The state of the test for one market. `days`: losses since the last alarm, oldest first; `ranked`: sorted."""

    evidence: float = 0.0
    days: list[float] = []
    ranked: list[float] = []
    alarms: int = 0
    since: int = 0  #: the day of the last alarm, in days since 1970 on the archive's clock; 0: none

    def judge(self, day: int, loss: float) -> bool:
        """Judge the loss of one more day. Returns whether it raises an alarm, after which the test begins anew."""
        if len(self.days) >= LEAST_DAYS:
            worse = len(self.ranked) - bisect_left(self.ranked, loss)
            p = (1 + worse) / (1 + len(self.ranked))
            self.evidence = (self.evidence + 1) * 0.5 / sqrt(p)
            if self.evidence >= FALSE_ALARM_DAYS:
                self.evidence, self.days, self.ranked = 0.0, [], []
                self.alarms += 1
                self.since = day
                return True
        self.days.append(loss)
        insort(self.ranked, loss)
        if len(self.days) > MOST_DAYS:
            del self.ranked[bisect_left(self.ranked, self.days.pop(0))]
        return False
