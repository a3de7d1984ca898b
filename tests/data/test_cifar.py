from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_lab.config import DatasetConfig
from sparse_lab.data import cifar
from sparse_lab.errors import UserError


def folder(dataset: DatasetConfig) -> Path:
    return Path(dataset.root) / "cifar-10-batches-py"


def test_images_and_labels_are_those_of_torchvision(cifar10: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cifar.load(cifar10, seed=1)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for train, images, labels in (
        (True, source.images, source.labels),
        (False, source.test_images, source.test_labels),
    ):
        reference = CIFAR10(cifar10.root, train=train)
        assert torch.equal(images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
        assert labels.tolist() == reference.targets
    assert source.images.shape == (40, 3, 32, 32) and source.images.dtype == torch.uint8
    assert source.labels.dtype == torch.int64


def test_cifar100_reads_the_fine_labels(cifar100: DatasetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "_load_meta", lambda self: None)
    source = cifar.load(cifar100, seed=1)
    assert source.labels.tolist() == CIFAR100(cifar100.root).targets
    assert list(source.md5) == ["cifar-100-python/train", "cifar-100-python/test"]


def test_official_files_are_recorded_as_such(cifar10: DatasetConfig, capsys: pytest.CaptureFixture[str]) -> None:
    cifar.check(cifar10)
    source = cifar.load(cifar10, seed=1)
    assert source.official
    wanted = {f"cifar-10-batches-py/{name}": md5 for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]}
    assert source.md5 == wanted
    assert capsys.readouterr().err == ""


def test_other_files_are_refused_or_said_loudly(cifar10: DatasetConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(cifar10) / "data_batch_3"
    official = CIFAR10.train_list[2][1]
    path.write_bytes((folder(cifar10) / "data_batch_1").read_bytes())
    for use in (cifar.check, lambda dataset: cifar.load(dataset, 1)):
        with pytest.raises(UserError, match=rf"{path} has md5 \w{{32}}.*{official}.*dataset.verify=false") as caught:
            use(cifar10)
        assert "\n" not in str(caught.value)
    source = cifar.load(dataclasses.replace(cifar10, verify=False), seed=1)
    assert not source.official
    assert source.md5["cifar-10-batches-py/data_batch_3"] == CIFAR10.train_list[0][1]
    assert torch.equal(source.images[16:24], source.images[:8])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "data_batch_3" in said and CIFAR10.train_list[0][1] in said


def test_a_truncated_file_is_never_used(cifar10: DatasetConfig) -> None:
    path = folder(cifar10) / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"data_batch_2 has md5"):
        cifar.check(cifar10)
    with pytest.raises(UserError, match=r"data_batch_2 cannot be read") as caught:
        cifar.load(dataclasses.replace(cifar10, verify=False), seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["folder", "file"])
def test_missing_data_names_the_folder_and_the_two_ways_out(cifar10: DatasetConfig, part: str) -> None:
    if part == "file":
        (folder(cifar10) / "test_batch").unlink()
    else:
        cifar10 = dataclasses.replace(cifar10, root=str(Path(cifar10.root) / "elsewhere"))
    for use in (cifar.check, lambda dataset: cifar.load(dataset, 1)):
        with pytest.raises(UserError, match=r"test_batch missing.*dataset.download=true.*paths.data=DIR") as caught:
            use(cifar10)
        assert str(folder(cifar10)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("verify", [True, False])
def test_a_malicious_file_is_never_run_whatever_its_md5(
    cifar10: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = folder(cifar10) / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Touch(), "labels": [0]}))
    if verify:
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", digest]])
    with pytest.raises(UserError, match=r"system.*nothing was run"):
        cifar.load(dataclasses.replace(cifar10, verify=verify), seed=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"labels": [0]},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0]},
        {"data": np.zeros((1, 3000), dtype=np.uint8), "labels": [0]},
        {"data": np.zeros((1, 3072), dtype=np.uint8), "labels": ["cat"]},
        {"data": [0] * 3072, "labels": [0]},
    ],
    ids=["no data", "too few labels", "another size", "words", "a list"],
)
def test_a_pickle_that_is_no_batch_is_refused(cifar10: DatasetConfig, content: Any) -> None:
    (folder(cifar10) / "data_batch_1").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="data_batch_1 is no CIFAR batch"):
        cifar.load(dataclasses.replace(cifar10, verify=False), seed=1)


def test_another_size_is_refused(cifar10: DatasetConfig) -> None:
    for use in (cifar.check, lambda dataset: cifar.load(dataset, 1)):
        with pytest.raises(UserError, match=r"dataset\.image_size=32"):
            use(dataclasses.replace(cifar10, image_size=64))
