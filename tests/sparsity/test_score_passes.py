"""Which scores make a step compute dense gradients, and a save before it worth the time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_lab.sparsity.masks import Masks
from sparse_lab.sparsity.scores import OWN_PASSES, SCORES, WITHOUT_PASSES, View


@pytest.mark.parametrize("name", sorted(SCORES.keys() - OWN_PASSES - {"reference"}))
def test_scores_said_to_need_no_gradients_need_none_and_no_other_is_called_so(name):
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    Masks(network)
    if name in WITHOUT_PASSES:
        found = SCORES[name](View(network))
        assert {key: value.shape for key, value in found.items()} == {"0": torch.Size((3, 4)), "1": torch.Size((2, 3))}
    else:
        with pytest.raises(ValueError, match="needs batches"):
            SCORES[name](View(network))
