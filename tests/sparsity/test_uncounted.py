"""What is large and not counted is named once, aloud."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sparse_lab import models
from sparse_lab.callbacks.sparsify import PruneCallback
from sparse_lab.errors import SparseLabError
from sparse_lab.models import compactors, dyrelu, offsets, weight_sharing
from sparse_lab.sparsity.masks import Masks, count, uncounted


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.place = nn.Parameter(torch.zeros(1, 7, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.GRU(8, 6, num_layers=2, batch_first=True)
        self.up = nn.ConvTranspose1d(7, 5, 3)
        self.norm = nn.LayerNorm((5, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.place
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1)) + self.memory(x)[0].mean() + self.norm(self.up(x)[..., :8]).mean()


WANTED = {
    "place": ("Parameter", 56),
    "words.weight": ("Embedding", 88),
    "attention.in_proj_weight": ("MultiheadAttention", 3 * 8 * 8),
    "memory.weight_ih_l0": ("GRU", 18 * 8),
    "memory.weight_hh_l0": ("GRU", 18 * 6),
    "memory.weight_ih_l1": ("GRU", 18 * 6),
    "memory.weight_hh_l1": ("GRU", 18 * 6),
    "up.weight": ("ConvTranspose1d", 7 * 5 * 3),
}


def test_what_is_not_counted_is_known_by_name_kind_and_size():
    found = uncounted(Mixed())
    assert {one["name"]: (one["kind"], one["weights"]) for one in found} == WANTED
    assert count(Mixed()) == 8 * 3 + 8 * 8, "the head, and what attention puts out"
    whole = sum(one.numel() for one in Mixed().parameters() if one.dim() > 1)
    assert count(Mixed()) + sum(one["weights"] for one in found) + 2 * 5 * 8 == whole, "the rest is normalisation"


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.LSTM, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.EmbeddingBag])
def test_each_kind_is_named(kind):
    layer = kind(4, 5, 3) if kind is nn.ConvTranspose2d else kind(4, 5)
    found = uncounted(nn.Sequential(nn.Linear(3, 4), layer))
    assert {one["kind"] for one in found} == {kind.__name__}
    assert sum(one["weights"] for one in found) == sum(one.numel() for one in layer.parameters() if one.dim() > 1)


def test_it_is_said_once_a_network_in_the_library():
    network = Mixed()
    with pytest.warns(UserWarning, match=r"attention\.in_proj_weight \(MultiheadAttention, 192\)") as said:
        Masks.of(network)
        Masks(network)
        PruneCallback(0.5).make(network, Masks.of(network), 10)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    text = str(said[0].message)
    assert "909 weights" in text and all(name in text for name in WANTED)
    with pytest.warns(UserWarning, match="not counted"):
        Masks(Mixed())


def test_many_are_said_in_one_line():
    network = nn.Sequential(nn.Linear(2, 2), *(nn.Embedding(3, 2) for _ in range(40)))
    with pytest.warns(UserWarning, match=r"240 weights.* and 32 more") as said:
        Masks(network)
    assert len(str(said[0].message)) < 600 and len(uncounted(network)) == 40


def test_an_embedding_tied_to_a_linear_layer_is_counted_there():
    network = nn.ModuleDict({"words": nn.Embedding(7, 4), "head": nn.Linear(4, 7)})
    network["words"].weight = network["head"].weight
    assert uncounted(network) == [] and count(network) == 28


@pytest.mark.parametrize(
    "name",
    ["vgg16", "resnet18", "resnet34", "resnet50", "resnet20", "resnet8", "wrn22_2", "densenet121", "mobilenet_v2"],
)
def test_our_networks_have_nothing_of_the_kind(name):
    plain, shared, faded = (models.build(name, width=0.125) for _ in range(3))
    if name != "mobilenet_v2":  # its activations are ReLU6
        dyrelu.install(faded, 32)
    offsets.install_dct(plain)
    if name in ("resnet34", "resnet50", "resnet20", "wrn22_2", "densenet121"):
        weight_sharing.share(shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [uncounted(one) for one in (plain, shared, faded)] == [[], [], []]
        Masks(faded)
    if name == "vgg16":
        compactors.install(shared, ["features.0"])
        assert uncounted(shared) == []


def test_a_network_that_cannot_be_counted_is_refused():
    with pytest.raises(SparseLabError, match="no conv or linear weights"):
        Masks(nn.Sequential(nn.LSTM(3, 4)))
    with pytest.raises(SparseLabError, match=r"'1'.*computed from others"):
        Masks(nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4))))
