"""How far a measured value may be from the true one: 95 % intervals of a mean and of a share."""

import math
import statistics
from collections.abc import Sequence


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation, and half the width of Student's 95 % interval of the mean."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    deviation = statistics.stdev(values)
    return mean, deviation, float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval, in percent, of a share of which ``correct`` of ``total`` were seen.

    Unlike the normal approximation it stays within 0 and 100 %: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)
