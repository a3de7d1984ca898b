"""States with sparse tensors: out and back bit for bit, few bytes, and nothing believed that a file only claims."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import resource
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_lab.coding.packed_state import FORMAT, KIND, STREAMS, packed, unpacked
from sparse_lab.errors import UserError

EXAMPLES = 1_000 if os.environ.get("NIGHT") else 60
SETTINGS = settings(deadline=None, max_examples=EXAMPLES, derandomize=True, database=None)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int32)
ODD = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1.5]  # live numbers that something could take for none


def written(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(packed(state), file)
    return file.getvalue()


def read(content: bytes) -> Any:
    return unpacked(torch.load(io.BytesIO(content), weights_only=True), "x.ckpt")


def same(one: Any, other: Any) -> None:
    """Equal to the bit, but for the sign of a zero where no mask is."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert bits(one) == bits(other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            same(value, other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for value, again in zip(one, other, strict=True):
            same(value, again)
    else:
        assert one == other


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A weight with its mask and what an optimizer remembers of it, in one of the places where checkpoints keep it."""
    shape = draw(st.sampled_from([(6, 5), (4, 3, 3, 3), (40,), (8, 2, 1, 3)]))
    seed, density = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.8, 1.0]))
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random(shape) < density)
    dtype = draw(st.sampled_from(DTYPES))
    numbers = []
    for _ in range(3):
        dense = torch.from_numpy(rng.standard_normal(shape) * 9)
        odd = torch.from_numpy(rng.choice(ODD, shape))
        dense = torch.where(torch.from_numpy(rng.random(shape) < 0.3), odd, dense)
        dense = torch.nan_to_num(dense, 7.0, 8.0, -8.0) if dtype == torch.int32 else dense
        numbers.append(torch.where(mask, dense, 0.0).to(dtype))
    if draw(st.booleans()):  # a weight that its mask does not hold
        numbers[0].view(-1)[rng.integers(mask.numel())] = 3
    if len(shape) == 4 and draw(st.booleans()):
        last = torch.channels_last
        numbers, mask = [one.contiguous(memory_format=last) for one in numbers], mask.contiguous(memory_format=last)
    weight, momentum, moment = numbers
    return {"weight": weight, "mask": mask, "state": {"momentum": momentum, "exp_avg": moment}, "step": 3}


@SETTINGS
@given(st.lists(layers(), min_size=1, max_size=4))
def test_any_state_comes_back_to_the_bit(found: list[dict[str, Any]]) -> None:
    network = OrderedDict((f"{i}.{key}", one[key]) for i, one in enumerate(found) for key in ("weight", "mask"))
    network["norm.weight"] = torch.full((7,), -0.0)
    network._metadata = OrderedDict(a={"version": 2})  # type: ignore[attr-defined]
    state = {
        "state_dict": network,
        "optimizer_states": [
            {"state": {i: one["state"] for i, one in enumerate(found)}, "param_groups": [{"lr": 0.1}]}
        ],
        "callbacks": {"best": {"network": {name: value.clone() for name, value in network.items()}}, "nothing": None},
        "pair": (torch.ones(2).tolist(), "x"),
    }
    again = read(written(state))
    same(again, state)
    assert again["state_dict"]._metadata == network._metadata
    again["state_dict"]["0.weight"] += 1  # what is read may be written to, each on its own
    assert bits(again["callbacks"]["best"]["network"]["0.weight"]) == bits(network["0.weight"])


def test_zeros_without_a_place_come_back_without_a_sign() -> None:
    mask = torch.tensor([True] + [False] * 9)
    weight = torch.randn(10) * mask  # -0.0 where it was negative
    assert torch.signbit(weight[1:]).any()
    again = read(written({"w": weight, "m": mask}))["w"]
    assert torch.equal(again, weight) and not torch.signbit(again[1:]).any()


def test_what_the_mask_does_not_hold_is_dense() -> None:
    mask = torch.zeros(300, 300, dtype=torch.bool)
    mask[0, 0] = True
    held, loose = mask * 2.0, torch.zeros(300, 300)
    loose[5, 5] = torch.nan  # one number that no mask knows
    state = {"a": held, "mask": mask, "b": loose}
    assert packed(state)["plain"] == {"a": None, "mask": None, "b": loose}
    assert math.isnan(read(written(state))["b"][5, 5])


def test_of_several_masks_the_one_that_holds_is_used() -> None:
    """Layers of one shape, and the masks of an earlier epoch: each tensor finds its own."""
    masks = [torch.rand(200, 50, generator=torch.Generator().manual_seed(i)) < 0.01 * (1 + i) for i in range(3)]
    state = {f"{i}": torch.where(mask, i + 1.0, 0.0) for i, mask in enumerate(masks)} | {
        f"mask{i}": mask for i, mask in enumerate(masks)
    }
    assert all(value is None for value in packed(state)["plain"].values())
    same(read(written(state)), state)


def test_a_tensor_in_two_places_is_one_tensor_again() -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[3] = True
    weight = mask * 5.0
    again = read(written({"a": weight, "b": weight, "mask": mask, "other": weight.clone()}))
    assert again["a"] is again["b"] and again["other"].data_ptr() != again["a"].data_ptr()


def test_a_state_without_masks_is_left_alone() -> None:
    state = {"state_dict": nn.Linear(4, 4).state_dict(), "mask": torch.ones(4, 4, dtype=torch.bool)}
    assert packed(state) is state
    same(unpacked(state, "x.ckpt"), state)  # and so read the checkpoints of before


def entropy(count: int, of: int) -> float:
    """Bytes that any code needs for positions at random (Stirling would add logarithms)."""
    density = count / of
    return -of * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8


@pytest.mark.parametrize("moments, density", [(1, 0.01), (2, 0.01), (1, 0.001), (1, 0.1)])
def test_bytes_are_near_the_bound(moments: int, density: float) -> None:
    rng = np.random.default_rng(0)
    state: dict[str, Any] = {"state_dict": {}, "optimizer": {}, "norm": torch.randn(2, 2000)}
    bound = 4.0 * state["norm"].numel()
    for name, shape in {"a": (128, 128, 3, 3), "b": (512, 256), "c": (128, 128, 3, 3)}.items():
        mask = torch.from_numpy(rng.random(shape) < density)
        state["state_dict"] |= {name: torch.randn(shape) * mask, f"{name}.mask": mask}
        state["optimizer"][name] = [torch.randn(shape) * mask for _ in range(moments)]
        count = int(mask.sum())
        bound += entropy(count, mask.numel()) + 4 * count * (1 + moments)
    assert len(written(state)) < 1.1 * bound + 4096  # and a zip archive's own


# --- files of somebody else's ---


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) < 0.1
    state = {"mask": mask, "w": mask * 1.5, "m": [mask * 2.0], "norm": torch.ones(7), "half": (mask * 3).bfloat16()}
    return packed({"state": state, "epoch": 3})


def said(payload: dict[str, Any]) -> dict[str, Any]:
    return json.loads(zlib.decompress(payload["head"].numpy().tobytes()))


def with_head(payload: dict[str, Any], head: Any) -> dict[str, Any]:
    text = zlib.compress(json.dumps(head).encode())
    return {**copy.deepcopy(payload), "head": torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())}


def refused(payload: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        unpacked(payload, "x.ckpt")
    line = str(caught.value)
    assert line.isprintable() and "x.ckpt" in line and len(line) < 400
    return line


def test_the_sound_one_is_read(sound) -> None:
    assert unpacked(with_head(sound, said(sound)), "x.ckpt")["state"]["m"][0].sum() > 0


WRONG: dict[str, Any] = {
    "positions beyond": lambda head: head["supports"][0].update(shape=[2, 2]),
    "number of positions, or more": lambda head: head["supports"][0].update(count=3),
    "count is no whole": lambda head: head["supports"][0].update(count=10**9),
    "bytes is no whole": lambda head: head["supports"][0].update(bytes=10**9),
    "bits is no whole": lambda head: head["supports"][0].update(bits=99),
    "stands for": lambda head: head["supports"][0].update(shape=[2**40, 2**40]),
    "stands for ": lambda head: head["supports"][0].update(shape=[2**20, 2**20]),
    "on is no whole": lambda head: head["tensors"][1].update(on=9),
    "fewer numbers": lambda head: head["tensors"][1].update(dtype="float64"),
    "more numbers": lambda head: head["tensors"].pop(),
    "is taken": lambda head: head["tensors"].append({"at": [["epoch"]], "dtype": "bool", "on": 0}),
    "no place": lambda head: head["tensors"][0].update(at=[["state", "?"]]),
    "no place ": lambda head: head["tensors"][0].update(at=[["state", "m", -1]]),
    "a place that is none": lambda head: head["tensors"][0].update(at=[[]]),
    "dtype is none of": lambda head: head["tensors"][0].update(dtype="object"),
    "channels_last": lambda head: head["tensors"][0].update(channels_last=True),
    "'shape' is not known": lambda head: head["tensors"][0].update(shape=[2]),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_contradicts_itself_is_one_line(words, sound) -> None:
    head = said(sound)
    WRONG[words](head)
    line = refused(with_head(sound, head))
    assert words.strip() in line or words == "number of positions, or more"


def test_streams_that_are_none_are_one_line(sound) -> None:
    for name in STREAMS:
        for wrong in (None, torch.ones(3), sound[name][:-1], sound[name][:, None], sound[name][1:]):
            refused({**copy.deepcopy(sound), name: wrong})
    refused({key: value for key, value in sound.items() if key != "small"})
    refused({**copy.deepcopy(sound), 3: 4})
    assert "newer" in refused({"format": f"{KIND}{FORMAT + 1}"})


def test_a_stream_unpacks_to_what_is_asked_for_and_no_further(sound) -> None:
    """Kilobytes that stand for a gigabyte."""
    bomb = np.frombuffer(zlib.compress(bytes(2**28)), dtype=np.uint8).copy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("small", "head"):
        refused({**copy.deepcopy(sound), name: torch.from_numpy(bomb)})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_zeros_take_no_memory_until_they_are_read(sound) -> None:
    """A head that claims as much as is allowed, tensor by tensor."""
    head = said(sound)
    [support] = head["supports"]
    support["shape"] = [2**20]
    payload = with_head(sound, head)
    size = sum(len(payload[name]) for name in STREAMS)
    payload["values"] = torch.cat([payload["values"], torch.zeros(2**17, dtype=torch.uint8)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(payload)  # more numbers than tensors, which is seen last
    assert size < 2**11 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**13


POOL = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    2**31,
    2**63,
    10**400,
    0.5,
    "",
    "bool",
    "float32",
    "\u202e",
    [],
    [[]],
    [1],
    {},
    [0, 0],
]


@SETTINGS
@given(st.data())
def test_any_other_head_is_a_state_or_one_line(sound, data: st.DataObject) -> None:
    head = said(sound)
    for _ in range(data.draw(st.integers(1, 2))):
        holder: Any = head
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
                break
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[key] = copy.deepcopy(data.draw(st.sampled_from(POOL)))
        elif len(head) > 1:
            del holder[key]
        if not isinstance(head, dict) or not head:
            break
    payload = with_head(sound, head)
    try:
        assert isinstance(unpacked(payload, "x.ckpt"), dict)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 400
