"""The ONNX file of a trace: written by torch's own exporter, with what is said of the network."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from sparse_lab.errors import UserError
from sparse_lab.export.onnx import MISSING, OPSET, library
from sparse_lab.host.machine import version
from sparse_lab.records.atomic_io import atomic_write
from sparse_lab.trace.trace import Trace, TracedNetwork


def save(trace: Trace, tensors: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> None:
    """Write the file, whole: input `images` float32 (N, C, H, W), output `logits` float32 (N, classes), any N.

    Raises UserError without the packages onnx and onnxscript, and for an operation that torch's exporter does not know.
    """
    onnx = library()
    model = _model(trace, tensors)
    model.producer_name, model.producer_version = "sparse_lab", version("sparse_lab") or ""
    onnx.helper.set_model_props(model, {key: str(value) for key, value in about.items()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _model(trace: Trace, tensors: Mapping[str, Tensor]) -> Any:
    try:
        import onnxscript  # noqa: F401  torch's exporter is written in it
    except ImportError:
        raise UserError(MISSING.format("onnxscript")) from None
    real = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    images = torch.zeros(3, *trace.images)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                TracedNetwork(trace, real).eval(),
                (images,),
                dynamo=True,
                dynamic_shapes=({0: Dim.DYNAMIC},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # it wraps whatever went wrong, and the first cause says most
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"torch's exporter writes no ONNX of this network ({line}): use --to packed") from None
    finally:
        logging.disable(before)
    assert program is not None
    return program.model_proto
