"""A network as a program for the inference kernels: feature maps get their places, weights become runs of offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numba
import numpy as np

import sparse_lab.sparse_cpu.threads  # noqa: F401  first of all
from sparse_lab.sparse_cpu import inference_kernels as kernels
from sparse_lab.sparse_cpu.simd import MOST, VECTOR

ACTIVATIONS = {"none": 0, "relu": kernels.RELU, "relu6": kernels.RELU6}
Pair = tuple[int, int]
RUN = 1024  # numbers of a strip of one image: the sums and four runs of inputs stay in the first cache
ADDRESSED = 2**31 - 1  # numbers of an arena, with as many images as there are lanes
LINE = 16  # numbers of a cache line
SLACK = 16  # numbers beyond an arena's end that a run's last vector may reach
ALONE = 100_000  # multiply-adds below which one thread is faster than two
FEW = 2  # images a thread up to which each is computed by itself


@dataclass
class Feature:
    """Where a feature map lies, in pixels: `first` is pixel (0, 0) of channel 0, `spare` the zeros around."""

    channels: int
    height: int
    width: int
    spare: int = 0
    first: int = -1
    readers: list[int] = field(default_factory=list)

    @property
    def pitch(self) -> int:
        return self.width + self.spare

    @property
    def plane(self) -> int:
        return (self.height + self.spare) * self.pitch

    @property
    def guard(self) -> int:
        return self.spare * (self.pitch + 1)

    @property
    def pixels(self) -> int:
        return self.guard + self.channels * self.plane


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation, each (down, across)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def tap(self, side: int, index: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Phase of the stride that a kernel position reads, and by how many of its pixels it is shifted."""
        away = np.asarray(index) * self.dilation[side] - self.padding[side]
        return away % self.stride[side], away // self.stride[side]


@dataclass
class Step:
    """One operation: what it reads and makes (numbers of features), and its row of the table but for the places."""

    kind: int
    source: int
    made: int
    residual: int | None = None
    row: dict[int, int] = field(default_factory=dict)
    taps: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    maps: tuple[np.ndarray, np.ndarray] | None = None


class Program:
    """Built operation by operation, each of which returns the number of the feature map that it makes; then `finish`.

    All weights and biases are float32 from here on.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.features = [Feature(channels, height, width)]
        self.steps: list[Step] = []
        self.table: list[np.ndarray] = []
        self.floats: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self._splits: dict[tuple[int, Pair], int] = {}
        self._masks: dict[Pair, int] = {}

    def conv(
        self,
        source: int,
        size: Pair,
        window: Window,
        weights: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        bias: np.ndarray,
        maps: tuple[np.ndarray, np.ndarray],
        residual: tuple[int, np.ndarray] | None,
        activation: str,
        pool: bool,
    ) -> int:
        """weights: (output, input, kernel row, kernel column, value) of each, sorted by output. bias [out]; maps: the
        channels with a bias map instead, and the maps. residual: a feature's number, and which of its channels is
        added to each output (-1: none). size: the outputs' height and width, before the 2x2 max pool if `pool`.
        """
        outputs, inputs, down, across, values = weights
        made = self._feature(len(bias), *((size[0] // 2, size[1] // 2) if pool else size))
        read = source if window.stride == (1, 1) else self._split(source, window.stride)
        phase_y, shift_y = window.tap(0, down)
        phase_x, shift_x = window.tap(1, across)
        self._make_room(read, size, window)
        planes = (inputs * window.stride[0] + phase_y) * window.stride[1] + phase_x
        order = np.lexsort((shift_x, planes, shift_y, outputs))
        step = Step(kernels.CONV, read, made, None if residual is None else residual[0], maps=maps)
        step.taps = planes[order], shift_y[order], shift_x[order]
        begin = sum(map(len, self.values))
        self.values.append(values[order].astype(np.float32))
        starts = np.searchsorted(outputs[order], np.arange(len(bias) + 1))
        start = np.array(bias, dtype=np.float32)
        step.row = {
            kernels.ROWS: self._in_table(begin + starts),
            kernels.BIAS: self._in_floats(start),
            kernels.ACTIVATION: ACTIVATIONS[activation],
            kernels.POOLED: int(pool),
            kernels.COST: (len(values) + 2 * len(bias)) * size[0] * size[1],
        }
        if residual is not None:
            step.row[kernels.RESIDUAL_ROWS] = self._in_table(residual[1])
        return self._put(step)

    def max_pool(self, source: int, size: Pair, window: Window, channels: np.ndarray) -> int:
        """`channels`: which of the source's is pooled into each output."""
        step = Step(kernels.MAX_POOL, source, self._feature(len(channels), *size))
        numbers = (*window.kernel, *window.stride, *window.padding)
        step.row = {kernels.WINDOW + place: number for place, number in enumerate(numbers)}
        step.row |= {kernels.ROWS: self._in_table(channels), kernels.COST: len(channels) * size[0] * size[1] * 9}
        return self._put(step)

    def average_pool(self, source: int, size: Pair, channels: np.ndarray) -> int:
        """Adaptive, as torch's."""
        step = Step(kernels.AVERAGE_POOL, source, self._feature(len(channels), *size))
        pixels = self.features[source].height * self.features[source].width
        step.row = {kernels.ROWS: self._in_table(channels), kernels.COST: len(channels) * pixels}
        return self._put(step)

    def finish(self) -> Executor:
        """Give every feature map its place; maps whose last reader is done lend theirs to later ones."""
        _align(self.features)
        size = _place(self.features, self.steps)
        if size * kernels.LANES > ADDRESSED:  # beyond, the kernels' offsets would point elsewhere
            raise ValueError(f"feature maps of {size:,} numbers, more than the kernels address")
        ops = np.array([self._op(step) for step in self.steps], dtype=np.int64)
        offsets = [self._offsets(step) for step in self.steps if step.taps is not None]
        return Executor(
            ops,
            _joined(self.table, np.int64),
            _joined(offsets, np.int32),
            _joined(self.values, np.float32),
            _joined(self.floats, np.float32),
            self.features[0],
            self.features[self.steps[-1].made],
            size,
        )

    def _split(self, source: int, stride: Pair) -> int:
        """The phases of a map under a stride, made once for all that read them."""
        if (source, stride) not in self._splits:
            of = self.features[source]
            phases = stride[0] * stride[1]
            made = self._feature(of.channels * phases, -(-of.height // stride[0]), -(-of.width // stride[1]))
            row = {kernels.WINDOW + 2: stride[0], kernels.WINDOW + 3: stride[1]}
            row[kernels.COST] = of.channels * of.height * of.width
            self._splits[source, stride] = self._put(Step(kernels.SPLIT, source, made, row=row))
        return self._splits[source, stride]

    def _feature(self, channels: int, height: int, width: int) -> int:
        self.features.append(Feature(channels, height, width))
        return len(self.features) - 1

    def _make_room(self, source: int, size: Pair, window: Window) -> None:
        """Spare pixels enough for every tap of a convolution that reads this map."""
        of = self.features[source]
        for side, have in enumerate((of.height, of.width)):
            shifts = window.tap(side, np.arange(window.kernel[side]))[1]
            before, after = -int(shifts.min()), size[side] - have + int(shifts.max())
            of.spare = max(of.spare, before, after, size[side] - have)

    def _put(self, step: Step) -> int:
        number = len(self.steps)
        self.steps.append(step)
        self.features[step.source].readers.append(number)
        if step.residual is not None:
            self.features[step.residual].readers.append(number)
        return step.made

    def _in_table(self, numbers: np.ndarray) -> int:
        self.table.append(numbers)
        return sum(map(len, self.table)) - len(numbers)

    def _in_floats(self, numbers: np.ndarray) -> int:
        self.floats.append(numbers.ravel())
        return sum(map(len, self.floats)) - numbers.size

    def _maps(self, step: Step) -> int:
        """Bias maps, whose rows lie as sums do, and so as the source's; behind them enough for a whole vector."""
        if step.maps is None or not len(step.maps[0]):
            return -1
        varying, maps = step.maps
        wide = np.zeros((len(varying), maps.shape[1], self.features[step.source].pitch))
        wide[..., : maps.shape[2]] = maps
        places = np.full(self.features[step.made].channels, -1)
        places[varying] = self._in_floats(wide) + np.arange(len(varying)) * wide[0].size
        self._in_floats(np.zeros(VECTOR))
        return self._in_table(places)

    def _shown(self, made: Feature) -> int:
        """1 for each pixel of a channel of this map, 0 for the spare ones; one for all maps of a size."""
        size = made.height, made.width
        if size not in self._masks:
            shown = np.zeros((made.height + made.spare, made.pitch))
            shown[: made.height, : made.width] = 1.0
            self._masks[size] = self._in_floats(np.append(shown, np.zeros(VECTOR)))
        return self._masks[size]

    def _op(self, step: Step) -> list[int]:
        source, made = self.features[step.source], self.features[step.made]
        row = [0] * kernels.COLUMNS
        row[: kernels.CHANNELS + 1] = [
            step.kind,
            *(source.first, source.height, source.width, source.pitch, source.plane),
            *(made.first, made.height, made.width, made.pitch, made.plane, made.guard, made.channels),
        ]
        row[kernels.RESIDUAL] = -1
        row[kernels.MAPS] = self._maps(step)
        for column, number in step.row.items():
            row[column] = number
        if step.residual is not None:
            added = self.features[step.residual]
            row[kernels.RESIDUAL : kernels.RESIDUAL_ROWS] = [added.first, added.pitch, added.plane]
        strip = _strip(made.height * (1 + row[kernels.POOLED]), source.pitch, 1 + row[kernels.POOLED])
        pitches = {source.pitch, made.pitch, *([] if step.residual is None else [row[kernels.RESIDUAL_PITCH]])}
        # a run is rounded up to whole vectors: the rest must fall on this channel's pixels
        end = (made.height - 1) * made.pitch + made.width
        last = end - (made.height - 1) // strip * strip * made.pitch
        direct = len(pitches) == 1 and not row[kernels.POOLED] and end + -last % VECTOR <= made.plane
        row[kernels.STRIP], row[kernels.DIRECT] = strip, int(direct)
        row[kernels.SHOWN] = self._shown(made) if direct else -1
        return row

    def _offsets(self, step: Step) -> np.ndarray:
        assert step.taps is not None
        source = self.features[step.source]
        planes, down, across = step.taps
        return planes * source.plane + down * source.pitch + across


def _strip(height: int, pitch: int, least: int) -> int:
    """Rows at a time: as many as fit a run, equally shared out, a multiple of `least`."""
    strips = max(1, round(height * pitch / RUN))
    return max(least, -(-height // (strips * least)) * least)


def _aligned(threads: int, numbers: int) -> np.ndarray:
    """Zeros, float32 [threads, numbers or a few more], each row on a cache line: a vector that lies on two takes twice
    as long.
    """
    row = -(-numbers // LINE) * LINE
    memory = np.zeros(threads * row + LINE, np.float32)
    begin = -memory.ctypes.data % (4 * LINE) // 4
    return memory[begin : begin + threads * row].reshape(threads, row)


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts]).astype(dtype)


def _align(features: list[Feature]) -> None:
    """The same spare pixels around all maps of one size: then sums lie as the outputs do, and as what is added."""
    most: dict[Pair, int] = {}
    for of in features:
        size = of.height, of.width
        most[size] = max(most.get(size, 0), of.spare)
    for of in features:
        of.spare = most[of.height, of.width]


def _place(features: list[Feature], steps: list[Step]) -> int:
    """First fit in the order in which maps are made; returns the arena's size in pixels."""
    taken: list[tuple[int, int, int]] = []  # first pixel, one past the last, the last step that reads it
    end = 0
    for number, made in [(-1, 0), *((number, step.made) for number, step in enumerate(steps))]:
        of = features[made]
        taken = sorted(span for span in taken if span[2] >= number)
        start = 0
        for first, last, _ in taken:
            if start + of.pixels <= first:
                break
            start = max(start, last)
        until = -(-(start + of.pixels) // 16) * 16  # places begin on cache lines
        taken.append((start, until, max(of.readers, default=len(steps))))
        of.first = start + of.guard
        end = max(end, until)
    return end


class Executor:
    """The finished program: float32 images (N, channels, height, width), contiguous and not read-only, to its last map,
    which has as many sides.
    """

    def __init__(
        self,
        ops: np.ndarray,
        table: np.ndarray,
        offsets: np.ndarray,
        values: np.ndarray,
        floats: np.ndarray,
        image: Feature,
        last: Feature,
        pixels: int,
    ) -> None:
        self.shape = (image.channels, image.height, image.width)
        self.made = (last.channels, last.height, last.width)
        self._place = (image.first, image.height, image.width, image.pitch, image.plane, image.guard, image.channels)
        self._end = (last.first, last.pitch, last.plane)
        self._ops, self._table = ops, table
        self._weights = {lanes: (offsets * np.int32(lanes), values, floats) for lanes in (1, kernels.LANES)}
        self._pixels = pixels
        self._arenas: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._shares: dict[int, np.ndarray] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        count = len(images)
        made = np.empty((count, *self.made), dtype=np.float32)
        if not count:
            return made
        threads = numba.get_num_threads()
        lanes = 1 if count <= FEW * threads else kernels.LANES
        arenas, sums = self._memory(lanes, threads)
        data = images, made, arenas, sums, lanes, self._place, self._end
        program = self._ops, self._table, *self._weights[lanes]
        if count <= lanes:
            kernels.run_layers(*data, *program, self._shared(threads), ALONE)
        else:
            kernels.run_blocks(*data, *program)
        return made

    def _memory(self, lanes: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Arenas and sums, [threads, ...], kept between calls: memory that is mapped anew costs more than the work."""
        key = lanes, threads
        if key not in self._arenas:
            longest = int((self._ops[:, kernels.STRIP] * self._ops[:, kernels.SRC_PITCH]).max(initial=1))
            self._arenas[key] = (
                _aligned(threads, self._pixels * lanes + SLACK),
                _aligned(threads, longest + MOST * VECTOR),
            )
        return self._arenas[key]

    def _shared(self, threads: int) -> np.ndarray:
        """Which channels of each operation each of `threads` gets: int64 [operations, threads + 1], of equal work."""
        if threads not in self._shares:
            ops, table = self._ops, self._table
            rows = []
            for op in ops:
                channels = np.arange(op[kernels.CHANNELS] + 1)
                work = 2 * channels
                if op[kernels.KIND] == kernels.CONV:
                    work = work + table[op[kernels.ROWS] + channels]
                wanted = work[0] + (work[-1] - work[0]) * np.arange(threads + 1) / threads
                rows.append(np.searchsorted(work, wanted))
            self._shares[threads] = np.array(rows, dtype=np.int64).reshape(len(ops), threads + 1)
        return self._shares[threads]
