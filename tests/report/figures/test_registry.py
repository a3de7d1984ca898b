from __future__ import annotations

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from sparse_lab.cli.report import main
from sparse_lab.report import levels, long, read, write
from sparse_lab.report.figures.accuracy import COLOURS, looks
from sparse_lab.report.figures.costs_and_curves import PALE
from sparse_lab.report.figures.layers import PHASES
from sparse_lab.report.figures.registry import COLUMNS, METHODS, PANELS, Picture, pictures
from sparse_lab.report.load.traces import traces

Make = Callable[..., Path]
Update = Callable[..., dict[str, Any]]
Put = Callable[..., None]
WENT = ("updates", "layers", "activations", "gradients")


def planned(root: Path) -> dict[str, Picture]:
    """The pictures of how runs went, by name."""
    return {picture.name: picture for picture in all_pictures(root) if picture.name in WENT}


def all_pictures(root: Path) -> list[Picture]:
    runs = read(root).results
    return pictures(long(runs, []), levels(runs), [], traces(runs)[0])


def drawn(picture: Picture, root: Path) -> np.ndarray:
    """The picture as an array of shape (height, width, 3), values in 0..1."""
    path = root / f"{picture.name}.png"
    picture.draw().savefig(path)
    return np.asarray(imread(path))[..., :3]


def holds(image: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=-1) < 0.01).sum())


def cycling(update: Update, **values: Any) -> list[dict[str, Any]]:
    """Two cycles of 4 and 8 epochs that rise to three times the density."""
    rows = []
    for epoch in range(13):
        place = epoch / 4 if epoch < 4 else (epoch - 4) / 8
        rows.append(update(epoch, round(100 * (2 - math.cos(2 * math.pi * place))), effective=50, **values))
    return rows


def layered(update: Update, effective: int = 1) -> list[dict[str, Any]]:
    layers = {f"layer{i}.conv": {"kept": 2, "total": 10**i, "effective": effective} for i in range(1, 6)}
    return [update(epoch, layers=layers) for epoch in (0, 3, 6)]


def activations(betas: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"epoch": i + 1, "beta": beta, "layers": {"stem": 0.5, "layer1.act": 0.1 * i}} for i, beta in enumerate(betas)
    ]


def test_a_picture_is_planned_only_where_there_is_something_to_show(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    folder = make_run(method="static")
    assert planned(tmp_path) == {}
    put_lines(folder, "updates", [update(0)])
    assert planned(tmp_path) == {}
    put_lines(make_run(method="rigl"), "updates", [update(0), update(1)])
    assert list(planned(tmp_path)) == ["updates"]
    put_lines(folder, "updates", layered(update))
    put_lines(folder, "gradients", [{"epoch": 1, "parts": {"biases": 0.5}}])
    put_lines(folder, "activations", activations([None]))
    assert tuple(planned(tmp_path)) == WENT


def test_a_dense_network_has_no_masks_to_draw(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    folder = make_run(method="dense", sparsity=0.0)
    put_lines(folder, "updates", [update(0, 10_000), update(1, 10_000)])
    put_lines(folder, "gradients", [{"epoch": 1, "parts": {"live weights": 0.5}}])
    assert list(planned(tmp_path)) == ["gradients"]
    assert holds(drawn(planned(tmp_path)["gradients"], tmp_path), "#222222") > 50


def test_a_method_has_one_look_in_all_pictures(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    for method in ("east", "rigl", "static"):
        for seed in (1, 2):
            folder = make_run(method=method, seed=seed)
            put_lines(folder, "updates", [update(0)] if method == "static" else cycling(update))
            put_lines(folder, "gradients", [{"epoch": i, "parts": {"live weights": seed / i}} for i in range(1, 9)])
    styles = looks(long(read(tmp_path).results, []))
    for picture in planned(tmp_path).values():
        image = drawn(picture, tmp_path)
        assert all(holds(image, styles[method]["color"]) > 100 for method in ("east", "rigl", "static"))
        assert holds(image, COLOURS[3]) == 0


def test_one_seed_has_no_band_and_two_have_one(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    def pale(image: np.ndarray) -> int:
        ink = np.array([int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return int((np.abs(image - (0.16 * ink + 0.84)).max(axis=-1) < 0.01).sum())

    put_lines(make_run(method="east", seed=1), "updates", cycling(update, live_logits=2))
    alone = pale(drawn(planned(tmp_path)["updates"], tmp_path))
    put_lines(make_run(method="east", seed=2), "updates", cycling(update, live_logits=9))
    assert pale(drawn(planned(tmp_path)["updates"], tmp_path)) > alone + 5000


@pytest.mark.full
def test_columns_wrap_and_the_rest_is_said(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    shares = [round(0.9 + i / 200, 3) for i in range(COLUMNS + 2)]
    sizes = []
    for share in shares:
        put_lines(make_run(method="east", sparsity=share), "updates", cycling(update))
        if share in (shares[0], shares[2], shares[5]):
            sizes.append(drawn(planned(tmp_path)["updates"], tmp_path).shape[:2])
    (low, narrow), (also_low, wide), (high, also_wide) = sizes
    assert wide > 2 * narrow and low == also_low and also_wide == wide and high == pytest.approx(2 * low, rel=0.02)
    assert f"{COLUMNS} of {len(shares)} columns" in planned(tmp_path)["updates"].sentence


def test_what_no_run_recorded_takes_no_row(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    folder = make_run(method="east")
    put_lines(folder, "updates", cycling(update))
    full = drawn(planned(tmp_path)["updates"], tmp_path).shape[0]
    put_lines(folder, "updates", cycling(update, explored=None))
    assert drawn(planned(tmp_path)["updates"], tmp_path).shape[0] < 0.85 * full


@pytest.mark.full
def test_many_long_labels_leave_room_for_the_panels(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    for number in range(METHODS + 8):
        note = f"{number:02d} " + "a setting with a long text $x^ " * 20
        folder = make_run(method="east", settings={"training.note": note, "training.lr": number / 10})
        put_lines(folder, "updates", cycling(update))
        put_lines(folder, "gradients", [{"epoch": 1, "parts": {"biases": 1.0}}])
    for name in ("updates", "gradients"):
        picture = planned(tmp_path)[name]
        height, width = drawn(picture, tmp_path).shape[:2]
        assert height < 2000 and width < 1600
        assert f"Shown are {METHODS} of {METHODS + 8} methods." in picture.sentence


def test_dead_layers_are_marked_in_the_heat_map(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    folder = make_run(method="east")
    counts = []
    for effective in (1, 0):
        put_lines(folder, "updates", layered(update, effective))
        counts.append(holds(drawn(planned(tmp_path)["layers"], tmp_path), "#CC3311"))
    assert counts[0] == 0 and counts[1] > 500


@pytest.mark.full
def test_heat_maps_and_activations_are_few_and_the_rest_is_said(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path
) -> None:
    for number in range(10):
        for seed in (1, 2):
            folder = make_run(method=f"m{number}", seed=seed)
            put_lines(folder, "updates", layered(update))
            put_lines(folder, "activations", activations([None] * 3))
    put_lines(make_run(method="phased"), "activations", activations([1.0, 0.5, None]))
    found = planned(tmp_path)
    assert "6 of 10 cells" in found["layers"].sentence
    assert f"{PANELS} of 11 cells" in found["activations"].sentence
    assert drawn(found["layers"], tmp_path).shape[0] < 3000
    image = drawn(found["activations"], tmp_path)
    assert image.shape[0] < 2000 and all(holds(image, look["color"]) > 100 for look in PHASES.values())


def test_a_gradient_of_zero_is_drawn(make_run: Make, put_lines: Put, tmp_path: Path) -> None:
    for method, norm in (("cut", 0.0), ("whole", 0.5)):
        rows = [{"epoch": epoch, "parts": {"live weights": norm}} for epoch in range(1, 20)]
        put_lines(make_run(method=method), "gradients", rows)
    styles = looks(long(read(tmp_path).results, []))
    image = drawn(planned(tmp_path)["gradients"], tmp_path)
    half = image.shape[0] // 2, image.shape[1] // 2  # the legend is to the right
    assert holds(image[: half[0], : half[1]], styles["whole"]["color"]) > 300
    assert holds(image[half[0] :, : half[1]], styles["cut"]["color"]) > 300


@pytest.mark.full
def test_the_report_holds_the_pictures_and_says_how_to_read_them(
    make_run: Make, put_lines: Put, update: Update, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(method="east", explored=0.125, kept_with_reuse=1234)
    put_lines(folder, "updates", layered(update), torn='{"step": 4')
    put_lines(folder, "activations", activations([1.0, 0.6, None]))
    put_lines(folder, "gradients", [{"epoch": 1, "parts": {"DyReLU": 0.5}}])
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    beside = ", ".join(f"{name}.png" for name in ("accuracy", *WENT))
    assert said.out.splitlines()[-1].endswith(f"table.tex, {beside}; the plots also as PDF")
    assert "updates.jsonl: 1 of 4 lines" in said.err
    text = (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    for name in WENT:
        png = (out / f"{name}.png").read_bytes()
        assert len(png) > 5000 and text.count(f"]({name}.png)") == 1
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF") and base64.b64encode(png).decode() in page
    assert "updates.jsonl: 1 of 4 lines" in text and "12.5%" in text and "1,234" in text


@pytest.mark.full
def test_a_picture_that_is_no_longer_drawn_goes(make_run: Make, put_lines: Put, update: Update, tmp_path: Path) -> None:
    folder = make_run(method="east")
    put_lines(folder, "updates", layered(update))
    names = ["accuracy.png", "updates.png", "layers.png"]
    assert [path.name for path in write([tmp_path], tmp_path).pictures] == names
    put_lines(folder, "updates", cycling(update))
    (tmp_path / "mine.png").write_bytes(b"kept")
    written = write([tmp_path], tmp_path)
    assert written.pictures == [tmp_path / "accuracy.png", tmp_path / "updates.png"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "updates.png", "mine.png"}
    assert {path.name for path in tmp_path.glob("*.pdf")} == {"accuracy.pdf", "updates.pdf"}
    assert "layers.png" not in written.report.read_text()


def test_pictures_of_what_came_out(make_run: Make, tmp_path: Path) -> None:
    for method, share in (("east", 0.5), ("rigl", 0.25)):
        layers = [{"name": f"layer{i}", "kept": round(1000 * share / i), "total": 1000} for i in range(1, 9)]
        cost = {"seconds": 60 * share, "flops": {"inference_sparse": 1e6 * share}, "peak_memory_mb": 900}
        for seed in (1, 2):
            folder = make_run(method=method, seed=seed, accuracy=90 * share + seed, layers=layers, **cost)
            rows = "".join(f"{epoch},{share / epoch},{90 * share - seed / epoch}\n" for epoch in range(1, 20))
            (folder / "metrics.csv").write_text(f"epoch,train_loss,validation_accuracy\n{rows}")
    table = long(read(tmp_path).results, [])
    found = {picture.name: picture for picture in all_pictures(tmp_path)}
    assert list(found) == ["accuracy", "costs", "density", "curves"]
    for picture in found.values():
        image = drawn(picture, tmp_path)
        assert all(holds(image, looks(table)[method]["color"]) > 100 for method in ("east", "rigl"))


def test_only_the_best_methods_have_a_colour_and_it_is_said(make_run: Make, tmp_path: Path) -> None:
    for number in range(METHODS + 3):
        layers = [{"name": f"layer{i}", "kept": number + i, "total": 1000} for i in range(1, 5)]
        make_run(method=f"m{number}", accuracy=50.0 + number, layers=layers, seconds=100.0 + number)
    found = {picture.name: picture for picture in all_pictures(tmp_path)}
    assert f"Shown are the {METHODS} of {METHODS + 3} methods with the highest" in found["density"].sentence
    assert f"{METHODS} of {METHODS + 3} methods" in found["costs"].sentence
    styles = looks(long(read(tmp_path).results, []))
    shown = {trace.label for trace in found["density"].draw.args[0]}  # type: ignore[attr-defined]
    assert shown == {f"m{number}" for number in range(3, METHODS + 3)}
    assert holds(drawn(found["costs"], tmp_path), PALE) > 20 and len(styles) == METHODS + 3


def test_costs_of_one_size_and_far_apart_can_both_be_drawn(make_run: Make, tmp_path: Path) -> None:
    for number in range(4):
        cost = {"seconds": 10.0 ** (2 * number), "peak_memory_mb": 5.0, "flops": {"inference_sparse": None}}
        make_run(method=f"m{number}", accuracy=50.0 + number, **cost)
    [_, costs] = all_pictures(tmp_path)
    image = drawn(costs, tmp_path)
    assert all(holds(image, COLOURS[number]) > 50 for number in range(4))


def test_a_report_of_old_records_is_as_it_was(make_run: Make, tmp_path: Path) -> None:
    make_run()
    written = write([tmp_path / "runs"], tmp_path / "out")
    text = written.report.read_text()
    assert [path.name for path in written.pictures] == ["accuracy.png"] and text.count("![") == 1
    assert not any(
        f"{name} |" in text or f"**{name}**" in text for name in ("effective", "explored", "kept_with_reuse")
    )
