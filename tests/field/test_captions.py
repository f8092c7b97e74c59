"""Captions and names as people's files have them: what is read, and which sentence a refusal is."""

from __future__ import annotations

import gzip
import json
import os
import tarfile

import pytest
from PIL import Image
from small_files import png, put, tar

from momatch.data.image_io import DataError
from momatch.data.reading import Reading
from momatch.data.sources import load_data, open_collection


def captions(source, reading=None):
    """Level → caption."""
    found = open_collection(str(source), *([reading] if reading else []))
    items = [found.item(i) for i in range(len(found))]
    return {int(item.pixels[0, 0]): item.caption for item in items}


PICTURES = {"0.png": 0, "1.png": 1}
WANTED = {0: "a cat", 1: "a dog"}
LINES = b'{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a dog"}\n'
WAYS = {
    "metadata.jsonl": {"metadata.jsonl": LINES},
    "a byte order mark": {"metadata.jsonl": b"\xef\xbb\xbf" + LINES},
    "line ends of Windows": {"metadata.jsonl": LINES.replace(b"\n", b"\r\n")},
    "no last line end": {"metadata.jsonl": LINES.rstrip()},
    "metadata.csv": {"metadata.csv": b"file_name,text\n0.png,a cat\n1.png,a dog\n"},
    "metadata.csv of Windows": {
        "metadata.csv": b'\xef\xbb\xbf"file_name","text"\r\n0.png,"a cat"\r\n1.png,a dog\r\n'
    },
    "both, of which jsonl counts": {
        "metadata.jsonl": LINES,
        "metadata.csv": b"file_name,text\n0.png,x\n1.png,y\n",
    },
    "txt beside png": {"0.txt": b"a cat\n", "1.txt": b"\xef\xbb\xbfa dog"},
    "caption beside png": {"0.caption": b"a cat", "1.caption": b"a dog"},
}


@pytest.mark.parametrize("way", WAYS)
def test_captions_are_read(tmp_path, way):
    source = put(tmp_path, {**PICTURES, **WAYS[way]})
    found = open_collection(str(source))
    assert found.has_captions and captions(source) == WANTED
    assert found.left_out == ({".csv": 1} if way.startswith("both") else {})


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_line_ends_at_a_line_end_alone(tmp_path, separator):
    text = f"a cat{separator}on a mat"
    line = json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False)
    if separator < " ":  # JSON itself wants it escaped
        line = json.dumps({"file_name": "0.png", "text": text})
    other = json.dumps({"file_name": "1.png", "text": "a dog"})
    source = put(tmp_path, {**PICTURES, "metadata.jsonl": f"{line}\n{other}\n".encode()})
    assert captions(source) == {0: text, 1: "a dog"}


def test_a_quoted_caption_of_a_csv_may_have_commas_and_lines(tmp_path):
    source = put(tmp_path, {"0.png": 0, "metadata.csv": b'file_name,text\n0.png,"a, ""b""\nc"\n'})
    assert captions(source) == {0: 'a, "b"\nc'}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"metadata.jsonl": b'{"file_name": "0.png"}\n{"text": "\xe9"}'}, "line 2 is not UTF-8 .byte 0xe9"),
        ({"metadata.jsonl": LINES.decode().encode("utf-16")}, "line 1 is not UTF-8"),
        ({"metadata.csv": "file_name,text\n0.png,é".encode("latin-1")}, "line 2 is not UTF-8"),
        ({"metadata.csv": b"name,text\n0.png,a\n"}, "no column file_name .it has name, text."),
        ({"metadata.csv": b""}, "no column file_name .it has nothing."),
        ({"metadata.csv": b"file_name,text\n0.png,a,b\n"}, "line 2 does not fit the columns"),
        ({"metadata.csv": b"file_name,text\n0.png,a\n1.png,\n"}, "line 3 has nothing in its field 'text'"),
        ({"metadata.csv": b"file_name,text\n"}, "names no pictures"),
        ({"metadata.jsonl": b"[" * 100_000}, "line 1 is not an object"),
        ({"metadata.jsonl": b'{"file_name": 5}'}, "line 1 is not an object"),
        ({"metadata.jsonl": b'["0.png"]'}, "line 1 is not an object"),
        ({"metadata.jsonl": b'{"file_name": ""}'}, "line 1 names .*add it or drop the line"),
        ({"metadata.jsonl": b'{"file_name": "a\\u0000.png"}'}, "line 1 names .*add it or drop"),
        ({"metadata.jsonl": json.dumps({"file_name": "a" * 5000}).encode()}, "line 1 names .*add it or drop"),
        ({"metadata.jsonl": b'{"file_name": "../elsewhere/0.png"}'}, "lies outside .*--anywhere"),
        ({"metadata.jsonl": b'{"file_name": "..\\\\elsewhere\\\\0.png"}'}, "which lies outside .*--anywhere"),
        ({"metadata.jsonl": b'{"file_name": "/etc/hostname"}'}, "names '/etc/hostname', which lies outside"),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path, files, says):
    put(tmp_path / "elsewhere", {"0.png": 9})
    with pytest.raises(DataError, match=says) as error:
        open_collection(str(put(tmp_path / "data", {**PICTURES, **files})))
    assert "\n" not in str(error.value)


def test_names_as_windows_writes_them_and_absolute_ones_inside(tmp_path):
    pictures = {"a/0.png": 0, "a/b/1.png": 1, "c/2.png": 2}
    names = ["a\\0.png", str(tmp_path / "a" / "b" / "1.png"), "a/../c/2.png"]
    lines = "\n".join(json.dumps({"file_name": n, "text": str(i)}) for i, n in enumerate(names))
    source = put(tmp_path, {**pictures, "metadata.jsonl": lines.encode()})
    assert captions(source) == {0: "0", 1: "1", 2: "2"} and open_collection(str(source)).identity()


@pytest.mark.parametrize("name", ["../elsewhere/0.png", "{absolute}"])
def test_pictures_outside_are_read_if_that_is_allowed(tmp_path, name):
    outside = put(tmp_path / "elsewhere", {"0.png": 9}) / "0.png"
    line = json.dumps({"file_name": name.format(absolute=outside), "text": "out"}).encode()
    source = put(tmp_path / "data", {"metadata.jsonl": line})
    assert captions(source, Reading(anywhere=True)) == {9: "out"}
    assert open_collection(str(source), Reading(anywhere=True)).identity()


def test_some_captions_beside_pictures_are_not_lost_without_a_word(tmp_path):
    found = open_collection(str(put(tmp_path, {**PICTURES, "1.txt": b"a dog"})))
    assert not found.has_captions and "0.png has no 0.txt beside it" in found.caption_help
    assert found.summary().startswith(
        "read 2 pictures; 1 have a caption in a file beside them, which is not read"
    )
    assert found.left_out == {".txt": 1}


def test_pictures_that_records_do_not_name_are_counted(tmp_path):
    found = open_collection(str(put(tmp_path, {**PICTURES, "2.png": 2, "metadata.jsonl": LINES})))
    assert found.summary() == "read 2 pictures; left out 1 .png"


def test_a_folder_by_its_relative_name_and_records_with_absolute_ones(tmp_path, monkeypatch):
    line = json.dumps({"file_name": str(tmp_path / "data" / ".0.png"), "text": "it"}).encode()
    put(tmp_path / "data", {".0.png": 4, ".1.png": 5, "metadata.jsonl": line})
    monkeypatch.chdir(tmp_path)
    found = open_collection("data")
    assert captions("data") == {4: "it"} and found.left_out == {"hidden file": 1} and found.identity()


def test_a_caption_beside_a_picture_that_is_no_text_is_named(tmp_path):
    source = put(tmp_path, {"0.png": 0, "0.txt": b"caf\xe9"})
    with pytest.raises(DataError, match="0.txt, line 1 is not UTF-8"):
        captions(source)


def test_file_names_of_any_bytes(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(png(3))
    found = open_collection(str(tmp_path))
    assert len(found.identity()) == 16 and found.item(0).pixels[0, 0] == 3


SHARDS = {
    "plain": ({"0.png": 0, "0.txt": b"a cat", "1.png": 1, "1.txt": b"a dog"}, WANTED),
    "keys with dots": ({"v1.0.png": 0, "v1.0.txt": b"a cat", "v1.1.png": 1, "v1.1.txt": b"a dog"}, WANTED),
    "masks beside pictures": (
        {"0.mask.png": 99, "0.png": 0, "0.txt": b"a cat", "1.png": 1, "1.mask.png": 99, "1.txt": b"a dog"},
        WANTED,
    ),
    "a byte order mark": ({"0.png": 0, "0.txt": b"\xef\xbb\xbfa cat", "1.png": 1, "1.txt": b"a dog"}, WANTED),
    "dots before names": ({"./0.png": 0, "./0.txt": b"a cat", "./1.png": 1, "./1.txt": b"a dog"}, WANTED),
    "leavings of a Macintosh": (
        {
            "0.png": 0,
            "._0.png": b"x",
            "0.txt": b"a cat",
            "1.png": 1,
            "1.txt": b"a dog",
            "__MACOSX/._1.png": b"x",
        },
        WANTED,
    ),
    "upper case": ({"0.PNG": 0, "0.TXT": b"a cat", "1.Png": 1, "1.txt": b"a dog"}, WANTED),
}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("packed", ["w", "w:gz", "w:bz2", "w:xz"])
def test_shards_as_they_lie_around(tmp_path, shard, packed):
    files, wanted = SHARDS[shard]
    ending = packed.replace("w:", ".").removeprefix("w")
    assert captions(tar(tmp_path / f"a.tar{ending}", files, packed)) == wanted


def test_a_compressed_shard_that_is_damaged_is_named(tmp_path):
    whole = tar(tmp_path / "a.tar.gz", {f"{i}.png": i for i in range(50)}, "w:gz")
    for contents in (whole.read_bytes()[:200], b"\x1f\x8bnothing", gzip.compress(b"no tar")):
        whole.write_bytes(contents)
        with pytest.raises(DataError, match="cannot read the shard .*a.tar.gz") as error:
            open_collection(str(whole))
        assert "\n" not in str(error.value)


def shards(root):
    for i in range(12):
        tar(root / f"part-{i:03d}.tar", {f"{i}.png": i, f"{i}.txt": str(i).encode()})
    return root


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("", range(12)),
        ("part-{000..003}.tar", range(4)),
        ("part-{009..011}.tar", range(9, 12)),
        ("part-00{1,7}.tar", (1, 7)),
        ("part-0{00..01}.tar", (0, 1)),
        ("part-01*.tar", (10, 11)),
        ("part-00?.tar", range(10)),
        ("*.tar", range(12)),
    ],
)
def test_shards_by_pattern(tmp_path, pattern, numbers):
    source = shards(tmp_path / "shards") / pattern if pattern else shards(tmp_path / "shards")
    assert captions(source) == {i: str(i) for i in numbers}


def test_shards_in_subfolders_and_other_files_beside_them(tmp_path):
    shards(tmp_path / "a")
    tar(tmp_path / "b" / "part.tar", {"20.png": 20, "20.txt": b"20"})
    put(tmp_path, {"b/part_stats.json": b"{}"})
    found = open_collection(str(tmp_path))
    assert captions(tmp_path) == {i: str(i) for i in (*range(12), 20)} and found.left_out == {".json": 1}


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no .*part-012.tar, one of .*add it, or leave it out"):
        open_collection(str(shards(tmp_path) / "part-{000..012}.tar"))
    with pytest.raises(DataError, match="no data at"):
        open_collection(str(tmp_path / "other-*.tar"))


def test_a_first_sample_without_a_caption_does_not_lose_the_others(tmp_path):
    source = tar(tmp_path / "a.tar", {"0.png": 0, "1.png": 1, "1.txt": b"a dog"})
    found = open_collection(str(source))
    assert found.has_captions and found.item(1).caption == "a dog"
    with pytest.raises(DataError, match="0 in .*a.tar has no 'text', though others have; add it, or leave"):
        found.item(0)


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([b"3", b"0"], [3, 0], []),
        ([b"dog\n", b"cat"], [1, 0], ["cat", "dog"]),
    ],
)
def test_class_files_hold_numbers_or_names(tmp_path, labels, numbers, names):
    files = {"0.png": 0, "0.cls": labels[0], "1.png": 1, "1.cls": labels[1]}
    found = open_collection(str(tar(tmp_path / "a.tar", files)))
    assert list(found.labels) == numbers and list(found.class_names) == names


def test_a_sample_without_a_label_is_left_out_and_said(tmp_path):
    files = {f"{i}.png": i for i in range(5)} | {f"{i}.cls": b"1" for i in range(5) if i != 2}
    found = open_collection(str(tar(tmp_path / "a.tar", files)))
    assert len(found) == 4 and "not read: 1 without a label, such as 2 in" in found.summary()


def test_links_in_a_tar_and_files_of_other_kinds_are_counted(tmp_path):
    path = tar(tmp_path / "a.tar", {"0.png": 0, "0.npy": b"x", "README": b"x", "lonely.txt": b"x"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
    found = open_collection(str(path))
    assert len(found) == 1
    assert found.left_out == {".npy": 1, "file without an ending": 1, ".txt": 1, "link in a tar": 1}


def test_a_picture_of_another_size_is_named_with_both(tmp_path):
    put(tmp_path, {f"{i}.png": 0 for i in range(100)})
    Image.new("L", (5, 4)).save(tmp_path / "z.png")
    with pytest.raises(DataError, match="z.png has 5×4 pixels, .*0.png 4×4; convert .* --image-size"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["train/0.png", "data/train/0.png", "train\\0.png"])
@pytest.mark.parametrize("source", ["data", "data/train"])
def test_names_from_a_folder_further_up(tmp_path, name, source):
    line = json.dumps({"file_name": name, "text": "it"}).encode()
    put(tmp_path / "data" / "train", {"0.png": 5, "metadata.jsonl": line})
    assert captions(tmp_path / source) == {5: "it"}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "make", [lambda p: put(p, {"0.png": POINTER}), lambda p: tar(p / "a.tar", {"0.png": POINTER})]
)
def test_a_picture_that_was_not_fetched_says_so(tmp_path, make):
    with pytest.raises(DataError, match="is a pointer of Git LFS, not the picture; run git lfs pull"):
        open_collection(str(make(tmp_path))).item(0)


@pytest.mark.parametrize(
    ("header", "label"), [("Label", "Label"), ("CLASS ", "CLASS "), ("LABELS", "LABELS")]
)
def test_fields_are_known_however_they_are_spelt(tmp_path, header, label):
    table = f"file_name,Text,{header}\n0.png,a cat,3\n1.png,a dog,4\n".encode()
    found = open_collection(str(put(tmp_path, {**PICTURES, "metadata.csv": table})))
    assert captions(tmp_path) == {0: "a cat", 1: "a dog"} and list(found.labels) == [3, 4]


def test_the_exact_name_of_a_field_goes_first(tmp_path):
    table = b"file_name,Label,label\n0.png,8,3\n1.png,9,4\n"
    found = open_collection(str(put(tmp_path, {**PICTURES, "metadata.csv": table})))
    assert list(found.labels) == [3, 4]


def test_fields_that_may_be_labels_are_named_when_no_label_is_read(tmp_path):
    table = b"file_name,text,category,split\n0.png,a cat,pets,a\n1.png,a dog,pets,b\n"
    found = open_collection(str(put(tmp_path / "a", {**PICTURES, "metadata.csv": table})))
    assert "of its fields category, split none is called label" in found.summary()
    plain = put(tmp_path / "b", {**PICTURES, "metadata.jsonl": LINES})
    assert "no label" not in open_collection(str(plain)).summary()
