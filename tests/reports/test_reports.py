import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from momatch.config.schema import DistillConfig, TeacherConfig, TrainConfig, to_json
from momatch.evaluation.evaluate import Row
from momatch.evaluation.metrics import EvaluationResult, Measurement
from momatch.evaluation.report import html, plots, tables
from momatch.utils.errors import UsageError


def measurement(metric, value, error=None, features="digits-classifier", n=20_000):
    low, high = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
    return Measurement(metric, value, error, low, high, features, "digits-heldout", n, 599, 0)


def row(name, steps, frechet, error=0.06, n=20_000):
    measured = [
        measurement("frechet", 99.0, 1.0, "pixels", n),
        measurement("frechet", frechet, error, n=n),
        measurement("frechet_floor", 0.93, 0.1, n=n),
        measurement("kid", 0.0021, 0.00044, n=n),
        measurement("precision", 0.954, n=599),
        measurement("recall", 0.9, n=599),
        measurement("class_accuracy", 0.9871, 0.0008),
        measurement("class_accuracy_reference", 0.993, 0.002),
        measurement("neighbour_ratio", 0.998, features="pixels"),
    ]
    return Row(name, steps, 12345.6 / steps, EvaluationResult(measured))


def teacher_rows():
    return [row("teacher", 8, 7.4), row("teacher", 64, 1.74), row("teacher", 256, 1.8)]


def write_run(path, rows=None, done=1000, config=None):
    (path / "samples").mkdir(parents=True)
    config = config or DistillConfig(train=TrainConfig(num_steps=1000))
    (path / "config.json").write_text(json.dumps(to_json(config)))
    rng = np.random.default_rng(0)
    lines = [dict(event="start", step=1, data_mean=-0.39, data_std=0.75)]
    for step in range(50, done + 1, 50):
        gap = float(0.02 * np.exp(-step / 400 + 0.3 * rng.normal()))
        student = dict(student_mean=-0.4, student_std=0.74, student_saturation=0.03)
        lines.append(dict(step=step, images_seen=step * 128, seconds=step * 0.2, gap=gap, **student))
        if step % 100 == 0:
            grid = f"samples/step-{step:08d}.png"
            images = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(step)) * 0.5
            plots.save_png(plots.image_grid(images), path / grid)
            lines.append(dict(event="look", step=step, frechet=2000 / step, num_samples=500,
                              features="digits-classifier", reference="digits-train", grid=grid))  # fmt: skip
    lines.append(dict(event="alarm", step=done, message="the mean is <odd>"))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rows is not None:
        for name, steps in (("student", 8), ("teacher", 64)):
            images = torch.rand(60, 1, 8, 8) * 2 - 1
            plots.save_png(plots.image_grid(images), path / f"samples/final-{name}-{steps}.png")
        text = json.dumps({"rows": [r.to_dict() for r in rows], "data": "digits"})
        (path / "evaluation.json").write_text(text)
    return path


def test_image_grid_keeps_every_pixel():
    images = torch.rand(7, 1, 8, 8) * 3 - 1.5
    grid = plots.image_grid(images, 4)
    gutter, tile = plots.GUTTER_PIXELS, 64
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (tile + gutter) + gutter, 4 * (tile + gutter) + gutter)
    expected = ((images.clamp(-1, 1) + 1) * 127.5).round().numpy()
    for i in range(7):
        y, x = (gutter + n * (tile + gutter) for n in divmod(i, 4))
        shown = grid[y : y + tile, x : x + tile].reshape(8, 8, 8, 8)
        assert (shown == expected[i, 0][:, None, :, None]).all()
    assert (grid[:gutter] == plots.GUTTER_GREY).all()


def test_image_grid_of_colour_and_of_few(tmp_path):
    grid = plots.image_grid(torch.full((2, 3, 64, 32), float("nan")), 10)
    assert grid.shape == (64 + 4, 2 * 34 + 2, 3)
    plots.save_png(grid, tmp_path / "grid.png")
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == grid).all()
    for shape in ((2, 4, 8, 8), (0, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="images have shape"):
            plots.image_grid(torch.zeros(shape))


def test_smoothing_keeps_level_and_length():
    values = np.exp(np.random.default_rng(0).normal(size=200))
    smoothed = plots.smooth(values)
    assert len(smoothed) == 200 and np.log(smoothed).std() < 0.4 * np.log(values).std()
    assert plots.smooth(np.full(5, 2.0)) == pytest.approx(np.full(5, 2.0))


def test_curves_leave_out_what_cannot_be_drawn():
    records = [
        dict(step=1, gap=0.5),
        dict(step=2, gap=float("nan")),
        dict(step=3, gap=0.0),
        dict(step=4),
        dict(step=5, gap=0.1),
    ]
    raw = plots.training_curve(records, "gap").axes[0].lines[0]
    assert list(raw.get_xdata()) == [1, 5] and list(raw.get_ydata()) == [0.5, 0.1]
    assert plots.training_curve(records, "gap").axes[0].get_yscale() == "log"


def test_quality_curve_draws_every_model_with_its_interval():
    axes = plots.quality_curve([*teacher_rows(), row("student", 8, 1.5)]).axes[0]
    assert [c.get_label() for c in axes.containers] == ["teacher", "student"]
    line, _, (bars,) = axes.containers[0].lines
    assert list(line.get_xdata()) == [8, 64, 256]
    assert bars.get_segments()[0][:, 1] == pytest.approx([7.4 - 1.96 * 0.06, 7.4 + 1.96 * 0.06])


@pytest.mark.parametrize(
    ("frechet", "outcome", "words"),
    [
        (1.4, "below", "below (better than) its teacher"),
        (1.7, "level", "intervals overlap"),
        (1.9, "level", "intervals overlap"),
        (2.2, "above", "above (worse than) its teacher"),
    ],
)
def test_verdict_says_what_the_intervals_allow(tmp_path, frechet, outcome, words):
    rows = [*teacher_rows(), row("student", 8, frechet), row("student", 4, 0.1)]
    found = tables.verdict(rows, steps=8)
    assert found.outcome == outcome and words in found.sentence
    assert "teacher at its best, 64 steps" in found.sentence
    page = html.write_report(write_run(tmp_path / "run", rows, done=0)).read_text()
    assert f'class="verdict {outcome}"' in page and words in page


def test_no_verdict_on_what_cannot_be_compared():
    other_n = [*teacher_rows(), row("student", 8, 1.0, n=4000)]
    assert (
        tables.verdict(other_n).outcome == "none"
        and "differ in sample size" in tables.verdict(other_n).sentence
    )
    assert "The rows differ" in tables.caption(other_n)
    assert tables.verdict(teacher_rows()).outcome == "none"
    assert tables.verdict([*teacher_rows(), row("student", 8, 1.0)], steps=4).outcome == "none"
    assert tables.verdict([*teacher_rows(), row("student", 8, 1.0, error=None)]).outcome == "none"


def test_tables_hold_the_numbers_and_their_circumstances():
    rows = [row("student", 8, 1.7741), Row("teacher", 1, 5.0, EvaluationResult([]))]
    assert tables.cells(rows[0]) == [
        *("student", "8", "1.77 [1.66, 1.89]", "0.930", "0.0021 ± 0.0004"),
        *("0.95", "0.90", "98.7%", "1.00", "1,543"),
    ]  # fmt: skip
    markdown = tables.evaluation_markdown(rows)
    assert "Accuracy of real pictures: 99.3%." in markdown
    assert [line.count("|") for line in markdown.splitlines()[:4]] == [len(tables.COLUMNS) + 1] * 4
    for part in (
        "n_generated = 20,000",
        "n_reference = 599",
        "digits-classifier",
        "digits-heldout",
        "seed = 0",
    ):
        assert part in markdown
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(tables.evaluation_table([row.to_dict() for row in rows]))
    assert "1.77 [1.66, 1.89]" in console.export_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.93, "0.930"), (12.345, "12.3"), (12345.6, "12,346"), (0.00012345, "0.000123"),
     (3e-7, "3.00e-07"), (float("nan"), "–"), (-1.5, "-1.50")],
)  # fmt: skip
def test_numbers_have_sane_digits(value, text):
    assert tables.number(value) == text


def test_report_is_one_self_contained_file(tmp_path):
    page = html.write_report(
        write_run(tmp_path / "run", [*teacher_rows(), row("student", 8, 1.5)])
    ).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|<script|https?://", page)
    assert sum(source.startswith("data:image/png") for source in sources) == 2 + html.LOOKS_SHOWN
    svgs = [base64.b64decode(s.split(",")[1]).decode() for s in sources if s.startswith("data:image/svg")]
    assert len(svgs) == 4 and all("<image" not in svg and "</svg>" in svg for svg in svgs)
    assert "step 100," in page and "step 1,000," in page
    assert "the mean is &lt;odd&gt;" in page
    assert "3 min 20 s" in page and "128,000 images seen" in page
    assert "optim.learning_rate" in page and "unfinished" not in page
    assert list(tmp_path.glob("run/.*")) == []


def test_report_of_a_run_stopped_halfway(tmp_path):
    run = write_run(tmp_path / "run", done=500)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 550, "ga')
    for look in run.glob("samples/*00000300.png"):
        look.unlink()
    page = html.write_report(run).read_text()
    assert "This run stopped at step 500 of 1,000" in page
    assert "has not been evaluated yet" in page and "There is no evaluation yet." in page
    assert "no final samples yet" in page and page.count("data:image/png") == 4


def test_report_of_many_alarms_shows_the_first(tmp_path):
    run = write_run(tmp_path / "run", done=100)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps(dict(event="alarm", step=100 + i, message="high")) + "\n" for i in range(50)
        )
    page = html.write_report(run).read_text()
    assert page.count("<li>") == html.ALARMS_SHOWN and "And 31 more in metrics.jsonl." in page


def test_report_of_next_to_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(DistillConfig())))
    page = html.write_report(tmp_path).read_text()
    for sentence in (
        "too few numbers",
        "No samples were drawn",
        "no final samples",
        "no evaluation yet",
        "stopped at step 0",
    ):
        assert sentence in page
    (tmp_path / "evaluation.json").write_text('{"rows": [{"name"')
    assert "evaluation.json cannot be read" in html.write_report(tmp_path).read_text()


def test_report_of_a_teacher_run(tmp_path):
    config = TeacherConfig(train=TrainConfig(num_steps=1000))
    run = write_run(tmp_path / "run", teacher_rows(), done=0, config=config)
    page = html.write_report(run).read_text()
    assert "Teacher for digits" in page and "at its best at 64 steps: FD 1.74" in page
    assert "load_student" not in page


def test_report_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        html.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_time_is_summed_over_resumptions():
    records = [dict(step=i, seconds=s) for i, s in enumerate([10.0, 20.0, 5.0, 15.0, 1.0])]
    run = html.ReadRun(None, {}, records, [], [], [])  # type: ignore[arg-type]
    assert run.seconds == 20 + 15 + 1
    assert [html.duration(s) for s in (4.6, 200, 18120)] == ["5 s", "3 min 20 s", "5 h 02 min"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200, None])
def test_a_table_is_never_cut(width):
    rows = [*teacher_rows(), row("student", 8, 1.7741), Row("student", 4, 5.0, EvaluationResult([]))]
    if width is None:
        text = tables.evaluation_text(rows)
        assert max(map(len, text.splitlines())) > 200  # the caption, in one line
    else:
        console = Console(width=width, record=True, file=open("/dev/null", "w"))
        console.print(tables.evaluation_table(rows, width))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "--color" not in text
    for cell in [cell for each in rows for cell in tables.cells(each) if cell != tables.MISSING]:
        assert cell in text
    assert {"teacher, 256" in text, "student, 4" in text} == {width is not None and width < 100}


def test_columns_without_numbers_go_first():
    plain = [m for m in row("student", 8, 1.77).result.measurements if "accuracy" not in m.metric]
    rows = [Row("student", 8, 12.0, EvaluationResult(plain))]

    def drawn(width):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))
        console.print(tables.evaluation_table(rows, width))
        return console.export_text()

    narrow = next(text for width in range(120, 40, -1) if "left out" in (text := drawn(width)))
    assert "Not measured, so left out: acc." in " ".join(narrow.split())
    assert " acc." not in narrow.splitlines()[1] and " recall" in narrow.splitlines()[1]
    assert "student, 8" not in narrow and "student, 8" in drawn(40) and " acc." in drawn(120).splitlines()[1]


def test_measurements_as_csv_are_all_there():
    rows = [row("student", 8, 1.77), row("teacher", 64, 1.74)]
    found = list(csv.DictReader(io.StringIO(tables.evaluation_csv(rows))))
    assert len(found) == 2 * 9 and found[0]["metric"] == "frechet" and float(found[1]["value"]) == 1.77
    assert found[-1]["name"] == "teacher" and found[-1]["low"] == ""
