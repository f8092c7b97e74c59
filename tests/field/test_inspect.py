"""`momatch inspect`: what would be read of data, said before anything is made of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small_files import put, tar

from momatch.cli import main


def said(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_folder_is_described_and_shown(tmp_path, capsys):
    files = {f"{name}/{i}.png": 200 for name, n in (("10", 3), ("9", 2)) for i in range(n)}
    root = put(tmp_path / "data", {**files, "9/a.heic": b"x", ".hidden": b"x", "9/bad.png": b"x"})
    Image.new("RGB", (30, 20), "red").save(root / "10" / "red.png")
    code, out, err = said(capsys, root, "--sheet", tmp_path / "sheet.png")
    assert code == 0 and not err
    lines = out.splitlines()
    assert lines[:4] == [
        f"{root}: 6 pictures and 1 file that cannot be read",
        "Classes: 2, in the order of their labels",
        "     0  9   2",
        "     1  10  4",
    ]
    assert "Sizes: 4×4 (5), 30×20 (1)" in lines and "Channels: grey (5), RGB (1)" in lines
    assert "Left out: 1 .heic, 1 hidden file" in lines
    assert "To do: they have 2 sizes; give --image-size, such as 4" in lines
    assert "To do: there are 6 pictures; 100 or more are needed" in lines
    assert sum(line.startswith("Damaged: ") and "bad.png" in line for line in lines) == 1
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tiles = sheet[34, 34 :: 64 + 2]  # the middle of each
    assert [tuple(tile) for tile in tiles] == [(200,) * 3] * 5 + [(255, 0, 0)], (
        "class 9 first, the damaged passed over"
    )


def test_nothing_is_written_unasked(tmp_path, capsys, monkeypatch):
    put(tmp_path / "data", {f"{i}.png": i for i in range(100)})
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(capsys, "data")
    assert (
        code == 0
        and out.splitlines()[-1] == "Nothing was written; --sheet FILE.png draws some of the pictures"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_sheet_of_many_damaged_files_draws_the_others(tmp_path, capsys):
    put(tmp_path / "data", {f"{i}.png": b"x" if i % 2 == 0 else 7 for i in range(10)})
    code, out, _ = said(capsys, tmp_path / "data", "--num", 3, "--sheet", tmp_path / "s.png")
    assert code == 0 and out.splitlines()[0].endswith("5 pictures and 5 files that cannot be read")
    assert np.asarray(Image.open(tmp_path / "s.png"))[34, 34 :: 64 + 2, 0].tolist() == [7, 7, 7]


def test_captions_and_labels_of_a_larger_set(tmp_path, capsys):
    files = {f"{i}.png": i for i in range(3)} | {f"{i}.txt": b"a" * i for i in range(3)}
    files |= {f"{i}.cls": str(i * 400).encode() for i in range(3)}
    shard = tar(tmp_path / "a.tar", files)
    code, out, _ = said(capsys, shard)
    assert code == 0 and "Captions: 2 of 3, the others are empty; the longest: 'aa'" in out
    assert "\n   800  1\n" in out
    assert "labels from 0 to 800 on 3 pictures" in out and "--num-classes 801" in out
    assert "Contact sheet" not in out
    assert "labels from" not in said(capsys, shard, "--num-classes", 801)[1]


def test_only_some_of_many_pictures_are_opened(tmp_path, capsys):
    np.savez(tmp_path / "data.npz", images=np.zeros((500, 4, 4), np.uint8))
    code, out, _ = said(capsys, tmp_path / "data.npz", "--most", 20)
    assert code == 0 and "Opened: 20 of them, evenly spread" in out and "Sizes: 4×4 (20)" in out
    assert "To do" not in out and "Classes: none" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digits"], "digits is ready for use as it is"),
        (["{tmp}/nothing"], "no data at"),
        (["{tmp}", "--most", "0"], "--most is 0; give a number of pictures"),
        (["{tmp}", "--sheet", "sheet.jpg"], "--sheet sheet.jpg must end in .png"),
        (["{tmp}"], "no pictures in"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, says):
    code, out, err = said(capsys, *[argument.format(tmp=tmp_path) for argument in arguments])
    assert code == 2 and says in err and err.count("\n") == 1 and not out


def test_vectors_are_described(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(200, 8, 2)), "obs": rng.normal(size=(200, 3))}
    np.savez(tmp_path / "a.npz", **arrays, label=np.arange(200) % 2 * 150, group=np.arange(200) // 10)
    code, out, err = said(capsys, tmp_path / "a.npz")
    assert (
        code == 0
        and not err
        and out
        == (
            f"{tmp_path / 'a.npz'}: read 200 rows of x (8×2); conditions obs (3); 151 classes, 149 of them "
            "without a row; 20 groups\n"
        )
    )
    assert "; 2 classes; 20 groups" in said(capsys, tmp_path / "a.npz", "--renumber-labels")[1]
    code, _, err = said(capsys, tmp_path / "a.npz", "--sheet", tmp_path / "s.png")
    assert code == 2 and "holds vectors; leave it out" in err
