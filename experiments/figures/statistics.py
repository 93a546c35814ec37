"""From numbers with noise to a verdict.

A claim holds where the whole interval of its number lies where the claim says, fails where the whole interval lies
elsewhere, and is not decidable otherwise: more seeds would tell, this scale does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

HELD, FAILED, UNDECIDED = VERDICTS = ("held", "did not hold", "not decidable at this scale")
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number and the 95 % interval around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def above(self, bound: float) -> str:
        """The verdict on the claim that the number is larger than a bound."""
        return self.within(bound, np.inf)

    def below(self, bound: float) -> str:
        """The verdict on the claim that the number is smaller than a bound."""
        return self.within(-np.inf, bound)

    def within(self, low: float, high: float) -> str:
        """The verdict on the claim that the number lies between two bounds."""
        if not np.all(np.isfinite([self.low, self.high])):
            return UNDECIDED
        if low < self.low and self.high < high:
            return HELD
        return FAILED if self.high <= low or self.low >= high else UNDECIDED


def exactly(value: float, bound: float) -> str:
    """The verdict on the claim that a number without noise is smaller than a bound."""
    return Estimate(value, value, value).below(bound)


def slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """The exponent of a power law: the slope of log y against log x by least squares, with Student's interval."""
    fit = stats.linregress(np.log(x), np.log(y))
    # Not `stats.t.interval`, which knows no interval of length 0.
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * fit.stderr
    return Estimate(fit.slope, fit.slope - reach, fit.slope + reach)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds, with Student's interval: infinite for a single one or several equal ones."""
    # Accuracies are counts: seeds that agree to the last image by chance say nothing of how far seeds lie apart.
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(float(np.mean(values)), -np.inf, np.inf)
    return Estimate(float(np.mean(values)), *stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE))


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of a - b over seeds that both have in common, in order."""
    return mean(np.subtract(a, b))


def gain(a: Sequence[float], b: Sequence[float]) -> tuple[Estimate, str]:
    """That difference, and in words with its standard error."""
    estimate, error = difference(a, b), stats.sem(np.subtract(a, b)) if len(a) > 1 else np.nan
    return estimate, f"{estimate}, standard error {error:.2g}"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's, with the interval of Fisher's transform (Fieller's standard error 1.03 / sqrt(n - 3))."""
    value = float(stats.spearmanr(x, y).statistic)
    if len(x) < 4:
        return Estimate(value, -1.0, 1.0)
    # A perfect order has an infinite transform; half a step short of it is as close as n ranks can tell.
    middle = np.arctanh(np.clip(value, -1 + 1e-3, 1 - 1e-3))
    interval = stats.norm.interval(CONFIDENCE, middle, 1.03 / np.sqrt(len(x) - 3))
    return Estimate(value, *map(float, np.tanh(interval)))


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """`mean ± standard deviation` over seeds, or the one value."""
    values = scale * np.asarray(values, float)
    return f"{values.mean():.3g}" if len(values) < 2 else f"{values.mean():.3g} ± {values.std(ddof=1):.2g}"


def fluctuation(values: Sequence[float]) -> float:
    """How far a curve jumps about its own course: the root mean square of what is left of second differences."""
    # The second difference of a straight line is 0, that of independent noise has 6 times its variance.
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6))
