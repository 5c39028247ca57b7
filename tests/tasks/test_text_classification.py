"""Labelled texts in every layout in which people keep them."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from subquad.tasks.base import DataPreset
from subquad.tasks.kinds import ClassificationData
from subquad.tasks.registry import load_task

REVIEWS = [
    (f"{word} film number {index}", label) for index in range(6) for word, label in (("good", "pos"), ("bad", "neg"))
]


def preset(*, max_length: int = 64) -> DataPreset:
    return DataPreset("toy", "toy", False, 100, 50, 50, max_length)


def read(path: Path, *, max_length: int = 64) -> ClassificationData:
    data = load_task("text").read(path, preset(max_length=max_length))
    assert isinstance(data, ClassificationData)
    return data


def contents(data: ClassificationData) -> set[tuple[str, int]]:
    pairs = (zip(split.inputs, split.labels.tolist(), strict=True) for split in data.splits.values())
    return {(tokens.tobytes().decode(), label) for part in pairs for tokens, label in part}


EXPECTED = {(text, int(label == "pos")) for text, label in REVIEWS}


def as_folders(folder: Path) -> Path:
    for index, (text, label) in enumerate(REVIEWS):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{index}.txt").write_text(text)
    return folder


def as_csv(folder: Path) -> Path:
    lines = ["Label,Text", *(f'{label},"{text}"' for text, label in REVIEWS)]
    (folder / "reviews.csv").write_text("\n".join(lines) + "\n")
    return folder / "reviews.csv"


def as_tsv(folder: Path) -> Path:
    (folder / "reviews.tsv").write_text("\n".join(["sentence\tclass", *(f"{t}\t{c}" for t, c in REVIEWS)]))
    return folder / "reviews.tsv"


def as_parquet(folder: Path) -> Path:
    texts, labels = zip(*REVIEWS, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"label": labels, "text": texts}), folder / "reviews.parquet")
    return folder / "reviews.parquet"


@pytest.mark.parametrize("layout", [as_folders, as_csv, as_tsv, as_parquet])
def test_every_layout_gives_all_texts_with_their_labels(layout, tmp_path: Path) -> None:
    data = read(layout(tmp_path))
    assert contents(data) == EXPECTED
    assert data.num_labels == 2
    assert [len(split) for split in data.splits.values()] == [8, 2, 2]
    assert all(set(split.labels) == {0, 1} for split in data.splits.values())
    assert read(layout(tmp_path)).data_hash == data.data_hash


def test_a_table_may_begin_with_a_byte_order_mark_as_excel_writes_it(tmp_path: Path) -> None:
    plain = as_csv(tmp_path)
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert contents(read(plain)) == EXPECTED


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_label_of_a_parquet_file_is_no_class(missing: float | None, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b", "c"], "label": pyarrow.array([1.0, 0.0, missing], from_pandas=False)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 3: the text has no label: give it one, or take the row out"):
        read(tmp_path / "a.parquet")


def test_an_empty_row_is_left_out(tmp_path: Path) -> None:
    path = as_csv(tmp_path)
    path.write_text(path.read_text() + ",\n")
    assert contents(read(path)) == EXPECTED


def test_splits_by_name_are_kept(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 3)):
        rows = [f"{label},{split} {label} {index}" for index in range(count) for label in ("a", "b")]
        (tmp_path / f"{split}.csv").write_text("\n".join(["label,text", *rows]))
    data = read(tmp_path)
    assert [len(split) for split in data.splits.values()] == [8, 2, 6]
    assert all(tokens.tobytes().startswith(b"test ") for tokens in data.test.inputs)


def test_longer_texts_are_cut_and_the_title_says_so(tmp_path: Path) -> None:
    data = read(as_csv(tmp_path), max_length=9)
    assert data.test.lengths.max() == 9
    assert data.title == "Texts of reviews.csv (12 of 12 cut to 9 bytes)"


def test_there_are_no_texts_but_the_users(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'text' has no texts of its own: name yours with --data PATH"):
        load_task("text").prepare(tmp_path, preset())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv is empty: expected columns called text and label"),
        ("a.csv", b"label,body\nx,y\n", "a.csv: expected a column of texts, called text, .* it has label, body"),
        ("a.csv", b"text,kind\nx,y\n", "a.csv: expected a column of labels, called label, .* it has text, kind"),
        ("a.csv", b"text,label\nx\n", "a.csv, line 2: expected 2 columns as in the first line, got 1"),
        ("a.csv", b"text,label\nx,1\ny,\n", "a.csv, line 3: the text has no label: give it one, or take the row out"),
        ("a.csv", b"text,label\nx, \n", "a.csv, line 2: the text has no label"),
        ("a.csv", b"text,label\n\xff,1\n", "a.csv: not a table in UTF-8"),
        ("a.csv", b"text,label\n", "a.csv holds no text with a label"),
        ("a.csv", b"text,label\na,1\nb,1\nc,1\n", "expected at least two classes, got 1"),
        ("a.csv", b"text,label\na,1\nb,2\n", "class '1' has 1 text left to be split"),
        ("a.parquet", b"nothing", "a.parquet: not a Parquet file that can be read"),
        ("a.json", b"{}", "a.json: expected a folder with a folder for each class, or a table"),
    ],
)
def test_what_is_no_table_of_labelled_texts_says_why(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_folder_needs_a_folder_for_each_class(tmp_path: Path) -> None:
    (tmp_path / "pos").mkdir()
    with pytest.raises(ValueError, match="holds 1 folders: expected one for each class, at least two"):
        read(tmp_path)


def test_a_parquet_file_without_its_package_names_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"Parquet files need pyarrow; .* pip install 'subquad\[data\]'"):
        read(path)
