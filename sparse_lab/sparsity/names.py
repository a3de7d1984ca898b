"""What a request has to know of scores and distributions by their names, before torch is imported.

What is registered joins them: these are changed in place, and every reader sees it.
"""

from __future__ import annotations

# scores that look at gradients
FROM_GRADIENTS = {"gradient", "taylor", "snip", "grasp", "synflow", "mest"}
# scores, of weights and of filters, that look at no training images
WITHOUT_DATA = {"magnitude", "lamp", "random", "reference", "synflow", "l1", "l2", "random_filters", "compactor"}
DISTRIBUTIONS = ["global", "uniform", "er", "erk", "equal", "lamp"]
