"""TensorBoard, read back with its own event reader."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sparse_lab.experiment.identity import run_dir
from sparse_lab.experiment.runner import run


def read(config) -> EventAccumulator:
    events = EventAccumulator(str(run_dir(config).path / "tensorboard"))
    events.Reload()
    return events


@pytest.mark.full
def test_scalars_masks_table_and_config(compose, quiet, metrics):
    config = compose("method=iterative", "sparsity=s90", "schedule.iterative.share=0.6", "logger=tensorboard")
    result = run(config, "x", quiet)
    events = read(config)
    for key in ("validation_accuracy", "kept", "learning_rate"):
        seen = [(one.step, one.value) for one in events.Scalars(key)]
        assert seen == [(row["step"], pytest.approx(row[key], rel=1e-5)) for row in metrics(config)]
    assert {"masks/effective_share", "density/features.0", "level/test_accuracy"} <= set(events.Tags()["scalars"])
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(result["test_accuracy"])
    (text,) = events.Tensors("levels/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + len(result["levels"])
    assert [int(line.split("|")[3]) for line in lines[2:]] == [level["kept"] for level in result["levels"]]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    sent = HParamsPluginData.FromString(content).session_start_info.hparams
    assert sent["method.name"].string_value == "iterative" and sent["training.lr"].number_value == config.training.lr


def test_a_run_that_goes_on_shows_no_step_twice(compose, quiet, plug, metrics):
    config = compose("method=dense", "logger=tensorboard", "trainer.checkpoint_every=2")
    plug(1)  # a row is there, a checkpoint is not
    with pytest.raises(RuntimeError, match="plug"):
        run(config, "x", quiet)
    plug(0)
    run(config, "x", quiet)
    assert [one.step for one in read(config).Scalars("epoch")] == [row["step"] for row in metrics(config)]
