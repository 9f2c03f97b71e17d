"""The learning rate as a pure function of the step: there is no scheduler state to save or to lose."""

import math

from megaresid.config import OptimizerOptions


def learning_rate(step: int, steps: int, options: OptimizerOptions) -> float:
    """The base learning rate of update ``step`` (0 is the first) of a run of ``steps`` updates.

    Linear warm-up reaches the peak at the last warm-up step; cosine (Loshchilov & Hutter 2017, arXiv 1608.03983,
    one cycle) and the linear decay of WSD (Hu et al. 2024, arXiv 2404.06395) reach the minimum at the last step.
    """
    peak, least = options.learning_rate, options.min_learning_rate
    warmup = round(options.warmup_fraction * steps)
    done = step + 1
    if done <= warmup:
        return peak * done / warmup
    if options.schedule == "constant":
        return peak
    if options.schedule == "cosine":
        progress = (done - warmup) / (steps - warmup)
        return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = min(round(options.decay_fraction * steps), steps - warmup)
    remaining = steps - done
    return peak if remaining >= decay else least + (peak - least) * remaining / decay
