"""Files of unknown origin are read without running what they ask for: one clear line comes, and nothing else."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torchvision
from torch.hub import get_dir

from sparse_lab import data, models
from sparse_lab.cli.main import main
from sparse_lab.config import DatasetConfig, TrainingConfig
from sparse_lab.errors import UserError
from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run
from sparse_lab.records.atomic_io import append_checksum

KINDS = ("zip", "legacy", "pickle")


def refused(traps, call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert not traps.sprung
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["last", "previous"])
def test_a_checkpoint_to_go_on_from(name, traps, compose, quiet):
    """With a seal of its own, as someone who knows the format would make it."""
    config = compose("method=dense")
    path = getattr(run_dir(config), name)
    traps.write(path, "zip")
    append_checksum(path)
    line = refused(traps, lambda: run(config, "test", quiet))
    assert str(path) in line and "not unpickled" in line


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["last", "previous", "best"])
@pytest.mark.parametrize("how", KINDS)
def test_a_checkpoint_without_a_seal_is_not_even_opened(how, name, traps, compose, quiet):
    config = compose("method=dense", "training.limit_batches=1")
    traps.write(getattr(run_dir(config), name), how)
    try:
        assert run(config, "test", quiet)["kept"]
    except UserError as error:
        assert "\n" not in str(error)
    assert not traps.sprung


@pytest.mark.every(3)
@pytest.mark.parametrize("how", KINDS)
def test_a_network_to_start_from_is_made_anew(how, traps, compose, quiet):
    dense, config = compose("method=dense"), compose("method=oneshot", "sparsity=s90")
    run(dense, "test", quiet)
    traps.write(run_dir(dense).best, how)
    if how == "zip":
        append_checksum(run_dir(dense).best)
    evil = run_dir(dense).best.read_bytes()
    assert run(config, "test", quiet)["kept"] and not traps.sprung
    aside = run_dir(dense).best.with_name(f"best.ckpt.{'foreign' if how == 'zip' else 'damaged'}")
    assert aside.read_bytes() == evil and run_dir(dense).result() is not None


@pytest.mark.every(3)
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(
    "key", ["method=oneshot_regrow method.regrow.score=reference method.regrow.reference", "model.weights"]
)
def test_files_that_a_request_names(key, how, traps, small, tmp_path, capsys):
    *others, key = key.split()
    for ending in (".pt", ".safetensors") if key == "model.weights" else (".pt",):
        path = tmp_path / f"evil{ending}"
        traps.write(path, how)
        request = [*small, *others, "sparsity=s90", f"{key}={path}", f"paths.outputs={tmp_path / 'out'}"]
        assert main(request) in (1, 2)
        assert not traps.sprung
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and str(path) in lines[0]


@pytest.mark.parametrize("how", KINDS)
def test_weights_of_a_network(how, traps, tmp_path):
    """By the reader of state dicts alone, whatever looked at the file before."""
    path = tmp_path / "evil.pt"
    traps.write(path, how)
    assert str(path) in refused(traps, lambda: models.build("vgg16", 10, 0.0625, 32, str(path)))


@pytest.mark.every(3)
@pytest.mark.parametrize("how", KINDS)
def test_a_run_to_export(how, traps, compose, quiet, tmp_path, capsys):
    config = compose("method=dense")
    run(config, "test", quiet)
    traps.write(run_dir(config).best, how)
    if how == "zip":
        append_checksum(run_dir(config).best)
    assert main(["export", str(run_dir(config).path), "--out", str(tmp_path / "net.pt")]) == 2
    assert not traps.sprung and not (tmp_path / "net.pt").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.full
def test_weights_that_torchvision_has_fetched_before(traps, tmp_path, monkeypatch):
    """torch's cache is not compared with a hash again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    url = torchvision.models.get_model_weights("vgg16_bn").DEFAULT.url
    cached = f"{get_dir()}/checkpoints/{url.rsplit('/', 1)[1]}"
    traps.write(tmp_path / "evil.pth", "zip")
    (tmp_path / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "evil.pth", cached)
    refused(traps, lambda: models.build("vgg16", 1000, 1.0, 224, "torchvision"))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_batches_of_cifar_that_are_not_verified(name, protocol, traps, tmp_path):
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    names = {"cifar10": [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}[name]
    for place in ("data", "labels", "more"):
        content = {"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 10, place: traps.bomb()}
        for one in names:
            path = tmp_path / place / folder / one
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(content, protocol=protocol))
            traps.prove(path)
        classes = 10 if name == "cifar10" else 100
        dataset = DatasetConfig(name=name, root=str(tmp_path / place), num_classes=classes, verify=False)
        line = refused(traps, lambda dataset=dataset: data.build(dataset, TrainingConfig(), seed=1))
        assert "system" in line and "nothing was run" in line


def test_numbers_of_fashion_mnist_are_no_pickles(traps, tmp_path):
    """numpy would unpickle an array of objects."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    evil = tmp_path / "evil.npy"
    np.save(evil, np.array([traps.bomb()], dtype=object), allow_pickle=True)
    np.load(evil, allow_pickle=True)
    assert traps.sprung
    traps.marker.unlink()
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            shutil.copy(evil, folder / f"{part}-{kind}-ubyte.gz")
    dataset = DatasetConfig(name="fashion_mnist", root=str(tmp_path), verify=False)
    assert "cannot be read" in refused(traps, lambda: data.build(dataset, TrainingConfig(), seed=1))


@pytest.mark.parametrize("verb", ["report", "status"])
def test_records_of_unknown_origin(verb, traps, tmp_path, capsys):
    """A folder full of files that are not what their names say, YAML that asks for a call among them."""
    folder = tmp_path / "runs" / "evil"
    call = f'!!python/object/apply:os.system ["touch {traps.marker}"]\n'
    for name in ("result.json", "status.json", "metrics.csv", "updates.jsonl", "activations.jsonl"):
        traps.write(folder / name, "pickle")
    for name in ("config.yaml", "multirun.yaml"):
        (folder / name).write_text(call)
    traps.write(folder / "checkpoints" / "best.ckpt", "zip")
    traps.write(tmp_path / "sweeps" / "x" / "plan.json", "pickle")
    arguments = ["--out", str(tmp_path / "page")] if verb == "report" else []
    assert main([verb, str(tmp_path), *arguments]) in (0, 1, 2)
    assert not traps.sprung


def test_a_folder_of_configs_that_asks_for_a_call(traps, tmp_path, capsys):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(f'seed: !!python/object/apply:os.system ["touch {traps.marker}"]\n')
    assert main(["--config-dir", str(tmp_path / "conf"), "experiment=evil"]) == 2
    assert not traps.sprung
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("place", ["images", "labels"])
def test_an_npz_with_objects_in_it(place, traps, tmp_path):
    """numpy would unpickle an array of objects; here its header is enough to refuse it."""
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    trap = np.empty(4, dtype=object)
    trap[:] = [traps.bomb()] * 4
    path = tmp_path / "a.npz"
    np.savez(path, **{"images": images, "labels": labels, place: trap})
    dataset = DatasetConfig(name="arrays", file=str(path), num_classes=None, image_size=None, channels=None)
    line = refused(traps, lambda: data.build(dataset, TrainingConfig(), seed=1))
    assert f"{place} is object [4]: an array of Python objects" in line
