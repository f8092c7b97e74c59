"""momatch runs and momatch watch: what a folder of runs says of itself, and of one that goes on."""

from __future__ import annotations

import csv
import io
import json
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from momatch.cli import main
from momatch.cli.runs import find, lines, summary
from momatch.utils.run_folder import LOCK, RunFolder

ARTIFACTS = Path(__file__).parent / "artifacts"


@pytest.fixture
def runs(tmp_path):
    """A finished run, one that was stopped, a damaged one below them, and folders that are none."""
    folder = tmp_path / "runs"
    shutil.copytree(ARTIFACTS / "alternating", folder / "done")
    shutil.copytree(ARTIFACTS / "alternating", folder / "more" / "[red]half")
    half = RunFolder(folder / "more" / "[red]half")
    shutil.rmtree(half.model("student"), ignore_errors=True)
    half.evaluation.unlink()
    half.forget_from(5)
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return folder


def test_runs_are_found_and_told_apart(runs, capsys):
    done, half = (summary(path) for path in find(runs))
    assert (done.run.name, half.run.name) == ("done", "[red]half")
    assert (done.state, half.state) == ("finished", "stopped")
    assert done.kind == "distill" and done.method == "alternating" and done.step == done.of and half.step == 4
    assert half.frechet == pytest.approx(65.38973290559659) and half.judged == "preview"
    with FileLock(half.run / LOCK):
        assert _state_elsewhere(half.run) == "running"
    assert summary(half.run).state == "stopped"
    assert main(["runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "[red]half" in shown and "65.4" in shown and "other" not in shown


def _state_elsewhere(path):
    """As another process sees it: a lock counts for the thread that holds it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(summary(path).state))
    thread.start()
    thread.join()
    return found[0]


def test_lists_for_programs_hold_every_number(runs, capsys):
    assert main(["runs", str(runs), "--format", "json"]) == 0
    from_json = json.loads(capsys.readouterr().out)
    assert main(["runs", str(runs), "--format", "csv"]) == 0
    from_csv = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["run"] for row in from_csv] == [row["run"] for row in from_json]
    assert float(from_csv[1]["frechet"]) == from_json[1]["frechet"]


def test_what_is_damaged_or_missing_is_no_traceback(runs, tmp_path, capsys):
    done = RunFolder(runs / "done")
    for contents in ("{", "[1]", '{"kind": "distill", "train": 3, "method": [], "steps": {}}'):
        done.config.write_text(contents)
        assert main(["runs", str(runs)]) == 0
    done.metrics.write_bytes(b"\xff\xfe{}\n")
    done.evaluation.write_text('{"rows": [{"name": "student"}]}')
    assert summary(done.path).step == 0
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_a_run_that_has_ended_is_shown_once_and_one_that_goes_on_is_followed(runs, capsys):
    assert main(["watch", str(runs / "done")]) == 0
    shown = capsys.readouterr().out
    assert (
        "finished" in shown
        and "step 6 of 6" in shown
        and "gap: 0.0004377" in shown
        and "alarm at step" in shown
    )
    assert main(["watch", str(runs / "other" / "x")]) == 2
    assert main(["watch", str(runs / "done"), "--every", "0"]) == 2
    half = RunFolder(runs / "more" / "[red]half")
    ready, over = threading.Event(), threading.Event()

    def work():
        with FileLock(half.path / LOCK):
            ready.set()
            over.wait(30)
            half.append([{"step": 5, "images_seen": 40, "seconds": 9.0, "gap": 0.5}])

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(30)
    threading.Timer(0.5, over.set).start()
    capsys.readouterr()
    assert main(["watch", str(half.path), "--every", "0.05"]) == 0
    thread.join()
    shown = capsys.readouterr().out
    assert "running" in shown and "stopped" in shown and "gap: 0.5" in shown


def test_the_pace_is_that_of_the_last_rows(runs):
    now = summary(runs / "done")
    rows = [
        {"step": s, "images_seen": 1, "seconds": float(t), "gap": 1.0} for s, t in ((2, 1), (4, 2), (6, 3))
    ]
    assert "step 6 of 6  2 steps/s" in lines(now, rows)[1]
    assert lines(now, [])[0].endswith("finished")
