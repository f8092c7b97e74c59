"""Pictures with captions and labels from every kind of source, and what is said when something is missing."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from momatch.data.collections import Fields
from momatch.data.image_io import DataError
from momatch.data.sources import load_data, open_collection
from momatch.utils.errors import Notice, UsageError

N = 102
PICTURES = np.random.default_rng(1).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
CAPTIONS = [f"picture {i}" for i in range(N)]
LABELS = [i % 3 for i in range(N)]


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def image_folder(path, text="text", label="label", names=("ant", "bee", "cat")):
    path.mkdir()
    lines = []
    for i, pixels in enumerate(PICTURES):
        (path / f"{i:03d}.png").write_bytes(png(pixels))
        lines.append({"file_name": f"{i:03d}.png", text: CAPTIONS[i], label: names[LABELS[i]]})
    write_metadata(path, lines)
    return lines


def write_metadata(path, lines):
    (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tar_shards(folder, records=("txt", "cls")):
    folder.mkdir()
    for first in range(0, N, 40):
        with tarfile.open(folder / f"{first:05d}.tar", "w") as archive:
            for i in range(first, min(first + 40, N)):
                parts = {"png": png(PICTURES[i])}
                if "txt" in records:
                    parts["txt"] = CAPTIONS[i].encode()
                if "cls" in records:
                    parts["cls"] = str(LABELS[i]).encode()
                if "json" in records:
                    parts["json"] = json.dumps({"caption": CAPTIONS[i], "label": LABELS[i]}).encode()
                for suffix, contents in parts.items():
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(contents)
                    archive.addfile(info, io.BytesIO(contents))


def hub_folder(path):
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "what it shows": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["ant", "bee", "cat"]),
            "number": datasets.Value("int64"),
        }
    )
    rows = {
        "picture": [{"bytes": png(pixels), "path": None} for pixels in PICTURES],
        "what it shows": CAPTIONS,
        "kind": LABELS,
        "number": list(range(N)),
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(path)
    return made


def parquet_files(path, kind):
    """As the hub has them, or as tools write them that know no features: bytes, or bytes and path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    if kind == "parquet of the hub":
        made = hub_folder(path.with_name("saved"))
        for i in range(2):
            made.shard(2, i, contiguous=True).to_parquet(path / f"train-{i:05d}-of-00002.parquet")
        made.select(range(5)).to_parquet(path / "test-00000-of-00001.parquet")
        return
    pictures = [png(pixels) for pixels in PICTURES]
    if kind == "parquet of bytes and path":
        pictures = [{"bytes": contents, "path": f"{i}.png"} for i, contents in enumerate(pictures)]
    table = pa.table({"jpg": pictures, "caption": CAPTIONS, "label": LABELS})
    pq.write_table(table, path / "a.parquet")


def make(kind, path):
    if kind == "folder with metadata":
        image_folder(path)
    elif kind == "tar with txt and cls":
        tar_shards(path)
    elif kind == "tar with json":
        tar_shards(path, ("json",))
    elif kind.startswith("parquet"):
        parquet_files(path, kind)
        if kind == "parquet of bytes":
            return str(path / "a.parquet")
        if kind == "parquet of bytes and path":
            return str(path / "*.parquet")
    else:
        hub_folder(path)
        return f"hf:{path}" if kind == "hub" else str(path)
    return str(path)


PARQUET = ["parquet of the hub", "parquet of bytes", "parquet of bytes and path"]
KINDS = ["folder with metadata", "tar with txt and cls", "tar with json", "hub", "saved", *PARQUET]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Of the datasets library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_pictures_captions_and_labels(tmp_path, kind):
    split = load_data(make(kind, tmp_path / "data"))
    assert len(split.train) + len(split.heldout) == N and split.train.num_classes == 3
    seen = {}
    for part in (split.train, split.heldout):
        for image, label, caption in zip(part.images, part.labels, part.captions, strict=True):
            seen[caption] = (image, int(label))
    assert set(seen) == set(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        image, label = seen[caption]
        want = torch.from_numpy(PICTURES[i]).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(image, want) and label == LABELS[i]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_knows_itself_again(tmp_path, kind):
    source = make(kind, tmp_path / "data")
    first, again = open_collection(source), open_collection(source)
    assert first.identity() == again.identity() and len(first) == N and first.has_captions
    if kind == "folder with metadata":
        file = tmp_path / "data" / "metadata.jsonl"
        file.write_text(file.read_text().replace("picture 7", "picture seven"))
        assert open_collection(source).identity() != first.identity()


def test_a_data_set_of_the_hub_is_asked_for_by_name_and_split(tmp_path, monkeypatch):
    import datasets

    hub_folder(tmp_path / "disk")
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.load_from_disk(tmp_path / "disk")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf:org/things", "hf:org/things:test", "hf:org/things/small:validation[:50%]"):
        assert len(open_collection(source)) == N
    assert asked == [
        ("org/things", None, "train"),
        ("org/things", None, "test"),
        ("org/things", "small", "validation[:50%]"),
    ]


def test_splits_saved_on_disk_and_named_columns(tmp_path):
    import datasets

    hub_folder(tmp_path / "one")
    one = datasets.load_from_disk(tmp_path / "one").add_column("other", [f"other {i}" for i in range(N)])
    datasets.DatasetDict({"train": one, "test": one.select(range(5))}).save_to_disk(tmp_path / "both")
    source = f"hf:{tmp_path / 'both'}"
    assert len(open_collection(source)) == N and len(open_collection(source + ":test")) == 5
    assert not open_collection(source).has_captions, "two columns of text, neither with a usual name"
    chosen = open_collection(source, Fields(caption_field="other", label_field="number"))
    assert chosen.item(4).caption == "other 4" and chosen.item(4).label == 4
    with pytest.raises(DataError, match="no column 'nothing'; it has picture"):
        open_collection(source, Fields(caption_field="nothing"))
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        open_collection(source + ":dev")


def test_of_parquet_files_one_split_is_read_and_the_others_are_named(tmp_path):
    parquet_files(tmp_path / "data", PARQUET[0])
    found = open_collection(tmp_path / "data")
    assert len(found) == N and "its other splits are not read: test" in found.summary()
    assert list(found.class_names) == ["ant", "bee", "cat"]
    test = open_collection(f"hf:{tmp_path / 'data'}:test")
    assert len(test) == 5 and "splits" not in test.summary()
    with pytest.raises(DataError, match="has no split 'dev'; it has .*: name one, as in hf:FOLDER:SPLIT"):
        open_collection(f"hf:{tmp_path / 'data'}:dev")


def one_parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [png(pixels) for pixels in PICTURES]
    pq.write_table(pa.table({"jpg": pictures, **columns}), path)
    return path


def test_which_columns_are_read_is_said_where_there_are_several(tmp_path):
    other = [png(255 - pixels) for pixels in PICTURES]
    found = open_collection(one_parquet(tmp_path / "a.parquet", conditioning=other, url=["x"] * N))
    assert np.array_equal(found.item(0).pixels, PICTURES[0]) and found.label is None
    said = found.summary()
    assert "the images are its column jpg; not read: conditioning" in said
    assert "its column url is taken as the caption" in said and "no label is read: of its fields" in said
    labelled = open_collection(one_parquet(tmp_path / "b.parquet", label=["7", "999", "7"] * (N // 3)))
    assert not labelled.has_captions, "a label is no caption"
    numbered = open_collection(tmp_path / "b.parquet", Fields(num_classes=1000))
    assert numbered.labels[:3] == [7, 999, 7] and labelled.labels[:3] == [0, 1, 0]


def test_parts_of_a_data_set_that_are_read_as_one_are_named(tmp_path):
    for name in ("train", "test"):
        one_parquet(tmp_path / f"{name}.parquet", label=LABELS)
    assert (
        "the files of test, train are read as one set" in open_collection(f"{tmp_path}/*.parquet").summary()
    )
    odd = one_parquet(tmp_path / "a:b.parquet", label=LABELS)
    assert len(open_collection(odd)) == N


def test_labels_numbered_anew_stay_so_where_images_are_left_out(tmp_path):
    labels = [label + 5 for label in LABELS]
    one_parquet(tmp_path / "a.parquet", label=labels)
    found = open_collection(tmp_path / "a.parquet", Fields(skip_unreadable=1, renumber_labels=True))
    assert [found.item(i).label for i in range(6)] == list(found.labels[:6]) == [0, 1, 2, 0, 1, 2]


def test_a_damaged_parquet_file_and_one_without_images_are_sentences(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match="cannot load .*a.parquet"):
        load_data(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": CAPTIONS}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has no column of pictures; it has text"):
        load_data(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no data at"):
        load_data(tmp_path / "c.parquet")
    pictures = [png(pixels) for pixels in PICTURES]
    pictures[7] = b"no picture"
    pq.write_table(pa.table({"image": pictures}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="cannot read .*d.parquet, picture 7 "):
        load_data(tmp_path / "d.parquet")


@pytest.mark.parametrize("kind", ["folder", "folder with metadata", "tar with txt and cls", "parquet"])
def test_images_that_cannot_be_read_are_left_out_if_that_is_wished(tmp_path, kind):
    """The others keep their labels and captions; a limit is a limit."""
    bad = png(PICTURES[0])[:50]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pictures = [bad if i in (3, 50) else png(pixels) for i, pixels in enumerate(PICTURES)]
        pq.write_table(pa.table({"image": pictures, "text": CAPTIONS, "label": LABELS}), tmp_path / "data")
        source = str((tmp_path / "data").rename(tmp_path / "data.parquet"))
    elif kind == "tar with txt and cls":
        tar_shards(tmp_path / "data")
        for tar in (tmp_path / "data").glob("*.tar"):
            contents = tar.read_bytes()
            for i in (3, 50):
                contents = contents.replace(png(PICTURES[i]), bytes(len(png(PICTURES[i]))))
            tar.write_bytes(contents)
        source = str(tmp_path / "data")
    else:
        image_folder(tmp_path / "data")
        if kind == "folder":
            (tmp_path / "data" / "metadata.jsonl").unlink()
            for i, caption in enumerate(CAPTIONS):
                (tmp_path / "data" / f"{i:03d}.txt").write_text(caption)
                (tmp_path / "data" / f"{i:03d}.cls").write_text(str(LABELS[i]))
        for i in (3, 50):
            (tmp_path / "data" / f"{i:03d}.png").write_bytes(bad)
        source = str(tmp_path / "data")
    with pytest.raises(DataError, match="cannot read"):
        load_data(source)
    with pytest.raises(DataError, match="more than 1 picture cannot be read, the limit of --skip"):
        load_data(source, reading=Fields(skip_unreadable=1))
    with pytest.warns(Notice, match="cannot read .*left out 2 unreadable pictures"):
        split = load_data(source, reading=Fields(skip_unreadable=2))
    assert len(split.train) + len(split.heldout) == N - 2
    for part in (split.train, split.heldout):
        for image, label, caption in zip(part.images, part.labels, part.captions, strict=True):
            i = CAPTIONS.index(caption)
            assert i not in (3, 50) and int(label) == LABELS[i]
            assert torch.equal(image, torch.from_numpy(PICTURES[i]).permute(2, 0, 1).float() / 127.5 - 1)
    whole = open_collection(source, Fields(skip_unreadable=2))
    assert whole.identity() == open_collection(source, Fields(skip_unreadable=9)).identity()
    assert whole.identity() != open_collection(source).identity()


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'momatch\[datasets\]'"):
        load_data("hf:org/things")


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="cannot load hf:org/things .Couldn't reach the hub.; give") as error:
        load_data("hf:org/things")
    assert "\n" not in str(error.value)


def break_source(kind, path):
    """Makes a broken source; returns what to load."""
    if kind.startswith("tar"):
        tar_shards(path)
        last = path / "00080.tar"
        if kind == "tar that is text":
            last.write_text("hello")
        elif kind == "tar cut short":
            last.write_bytes(last.read_bytes()[:9000])
        else:
            with tarfile.open(path / "00099.tar", "w") as archive:
                contents = png(PICTURES[0])
                info = tarfile.TarInfo("lonely.png")
                info.size = len(contents)
                archive.addfile(info, io.BytesIO(contents))
        return
    lines = image_folder(path)
    if kind == "missing file":
        (path / "005.png").unlink()
    elif kind == "caption absent":
        del lines[7]["text"]
    elif kind == "odd label":
        lines[3]["label"] = 1.5
    elif kind == "mixed labels":
        lines[3]["label"] = 1
    elif kind == "no caption text":
        lines[3]["text"] = 5
    elif kind == "no file name":
        del lines[2]["file_name"]
    write_metadata(path, lines)
    if kind == "not json":
        (path / "metadata.jsonl").write_text("file_name,text\n")
    elif kind == "empty metadata":
        (path / "metadata.jsonl").write_text("\n")
    elif kind == "damaged picture":
        (path / "006.png").write_bytes((path / "006.png").read_bytes()[:60])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing file", "metadata.jsonl, line 6 names .*005.png.*add it or drop the line"),
        ("caption absent", "line 8 has no field 'text' .it has file_name, label.; add it"),
        ("odd label", "has the label 1.5; labels are whole numbers"),
        ("mixed labels", "has the label 1; labels are whole numbers from 0, or all texts"),
        ("no caption text", "caption of .*003.png is 5; a caption is a text"),
        ("no file name", 'line 3 is not an object with a "file_name"'),
        ("not json", "line 1 is not an object"),
        ("empty metadata", "names no pictures"),
        ("damaged picture", "cannot read the picture .*006.png"),
        ("tar that is text", "cannot read the shard .*00080.tar"),
        ("tar cut short", "00080.tar"),
        ("tar without caption", "lonely in .*00099.tar has no '(text|label)', though the first sample has"),
    ],
)
def test_what_is_broken_is_named_in_one_sentence(tmp_path, kind, says):
    path = tmp_path / "data"
    break_source(kind, path)
    with pytest.raises(UsageError, match=says) as error:
        load_data(str(path))
    assert "\n" not in str(error.value)


def test_another_field_may_be_the_caption(tmp_path):
    image_folder(tmp_path / "data", text="words", label="sort")
    assert not open_collection(str(tmp_path / "data")).has_captions
    assert open_collection(str(tmp_path / "data"), Fields("words", "sort")).item(2).caption == "picture 2"
    with pytest.raises(DataError, match="line 1 has no field 'none'"):
        open_collection(str(tmp_path / "data"), Fields(caption_field="none"))
