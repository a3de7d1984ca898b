"""What is recognised of a set, class by class, against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from sparse_lab.training.evaluate import accuracy, class_accuracy, recognised


@pytest.fixture
def seen() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.nn.Linear(8, 6), torch.randn(101, 8), torch.randint(0, 5, (101,))  # none of class 5


def test_hits_and_images_of_each_class_are_counted(seen):
    model, images, labels = seen
    counts = recognised(model, zip(images.split(13), labels.split(13), strict=True))
    predicted = model(images).argmax(1)
    assert accuracy(counts) == pytest.approx(100 * accuracy_score(labels, predicted), abs=1e-12)
    recall = recall_score(labels, predicted, labels=list(range(5)), average=None)
    assert class_accuracy(counts)[:5] == [round(100 * one, 4) for one in recall] and class_accuracy(counts)[5] is None
    assert counts[1].tolist() == [*labels.bincount(minlength=5).tolist(), 0]


def test_a_network_in_training_is_asked_in_evaluation_and_goes_on_training():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(1.0)).train()  # training, it answers zeros
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    counts = recognised(model, [(torch.ones(5, 4), torch.ones(5, dtype=torch.long))])
    assert counts.tolist() == [[0, 5, 0], [0, 5, 0]] and model.training
