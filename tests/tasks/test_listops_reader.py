import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.tasks import listops_reader, listops_tsv
from subquad.tasks.listops import read_listops, tokenize
from subquad.tasks.listops_reader import CACHE_NAME, find_listops
from subquad.tasks.listops_tsv import FILE_NAMES, read_tsv
from subquad.tasks.splits import LabelledSplit

HEADER = b"Source\tTarget\r\n"
GOOD = b"( ( ( [MAX 2 ) 9 ) ] )\t9\r\n"
LONGER = b"( ( ( ( [MAX 2 ) ( ( ( ( [MED 4 ) 7 ) 9 ) ] ) ) 3 ) ] )\t7\r\n"


def write_files(folder: Path, body: bytes = GOOD + LONGER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILE_NAMES.values():
        (folder / name).write_bytes(HEADER + body)
    return folder


def read(tmp_path: Path, content: bytes) -> LabelledSplit:
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(content)
    return read_tsv(path)


def test_tokens_and_labels_are_those_of_the_file(tmp_path: Path):
    data = read_listops(write_files(tmp_path))
    assert data.train.inputs[1].tolist() == [12, 3, 13, 5, 8, 10, 15, 4, 15]
    assert data.train.labels[1] == 7
    assert [len(split) for split in (data.train, data.validation, data.test)] == [2, 2, 2]
    assert data.train.lengths.tolist() == [4, 9]
    assert (data.vocab_size, data.pad_token_id, data.num_labels, data.max_length) == (17, 0, 10, 2000)
    assert (data.train.inputs.values.dtype, data.train.labels.dtype, data.train.inputs.offsets.dtype) == (
        np.uint8,
        np.int64,
        np.int64,
    )


@pytest.mark.parametrize(
    "nesting", [".", "listops-1000", "lra_release/listops-1000", "lra_release/lra_release/listops-1000", "listops"]
)
def test_files_are_found_in_the_known_layouts(tmp_path: Path, nesting: str):
    folder = write_files(tmp_path / nesting)
    assert find_listops(tmp_path).samefile(folder)


def test_no_files_is_an_error_that_says_where_they_were_looked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no ListOps data in .*basic_train\.tsv.*lra_release/listops-1000"):
        read_listops(tmp_path / "absent")


def test_a_missing_file_is_named(tmp_path: Path):
    write_files(tmp_path)
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"lacks basic_val\.tsv: expected basic_train\.tsv, basic_val\.tsv"):
        read_listops(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.tsv: No such file"):
        read_tsv(tmp_path / "absent.tsv")


def test_line_ends_make_no_difference(tmp_path: Path):
    content = HEADER + GOOD + LONGER
    for other in (content.replace(b"\r\n", b"\n"), content.removesuffix(b"\r\n"), content.removesuffix(b"\n")):
        split = read(tmp_path, other)
        assert split.labels.tolist() == [9, 7]
        assert split.lengths.tolist() == [4, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"basic_train\.tsv is empty: expected the header 'Source<TAB>Target'"),
        (HEADER, r"basic_train\.tsv has a header but no examples"),
        (GOOD, r"line 1: expected the header 'Source<TAB>Target', got '\( \( \( \[MAX"),
        (b"Source,Target\n", r"line 1: expected the header .*, got 'Source,Target\\n'"),
        (b"\xff\xfeS\x00o\x00", r"line 1: expected UTF-8 text, got byte 0xff: save the file as UTF-8"),
        (HEADER + GOOD + b"( [MAX 2 9 ] )\xe9\t9\n", r"line 3: expected UTF-8 text, got byte 0xe9"),
        (
            HEADER + GOOD + b"( [MAX 2 9 ] ) 9\n",
            r"line 3: expected one tab, .*, got '\( \[MAX 2 9 \] \) 9': correct or",
        ),
        (HEADER + b"[MAX 2 9 ]\t9\t9\n" + GOOD, r"line 2: expected one tab"),
        (HEADER + b"[MAX 2 9 ]\t9\t9\n[MIN 2 9 ]\n", r"line 2: expected one tab"),
        (HEADER + GOOD + b"\r\n" + GOOD, r"line 3: expected one tab"),
        (HEADER + GOOD + b"[MAX 2 9 ]\t10\n", r"line 3: expected one digit from 0 to 9 after the tab, got .*10'"),
        (HEADER + b"[MAX 2 9 ]\t\n", r"line 2: expected one digit"),
        (HEADER + b"[MAX 2 9 ]\tx\n", r"line 2: expected one digit"),
        (HEADER + b"[MAX 2 9 ]\t-1\n", r"line 2: expected one digit"),
        (HEADER + GOOD + b"( ( [MAX 2 ) 9 ) ] )\t9\n", r"line 3: expected an expression with balanced parentheses"),
        (HEADER + b") [MAX 2 9 ] (\t9\n", r"line 2: expected an expression with balanced parentheses"),
        (HEADER + b"( [MAX 2 9 ]\t9\n) [MAX 2 9 ]\t9\n", r"line 2: expected an expression with balanced parentheses"),
        (HEADER + GOOD + LONGER + b"[MAX 2 9\t9\n", r"line 4: expected an expression with balanced brackets"),
        (HEADER + b"2 ] [MAX 9\t9\n", r"line 2: expected an expression with balanced brackets"),
        (HEADER + b"\t9\n", r"line 2: expected an expression before the tab"),
        (HEADER + GOOD + b"( )\t9\n", r"line 3: expected an expression before the tab"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_lines_are_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listops_tsv, "_BLOCK_BYTES", 64)
    assert read(tmp_path, HEADER + (GOOD + LONGER) * 20).labels.tolist() == [9, 7] * 20
    with pytest.raises(ValueError, match="line 42: expected one digit"):
        read(tmp_path, HEADER + (GOOD + LONGER) * 20 + b"[MAX 2 9 ]\tx\n")


def test_a_long_line_is_shown_shortened(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got '\[MAX 1 1 .* \.\.\. \(20009 bytes\)"):
        read(tmp_path, HEADER + b"[MAX " + b"1 " * 10_000 + b"]\tx\r\n")


words = st.sampled_from(
    [
        "( ",
        " )",
        "0 ",
        "7",
        "12",
        "[MIN ",
        "[MAX ",
        "[MED ",
        "[SM ",
        "[FIRST ",
        "[MI",
        "[SMX ",
        "MAX",
        " ] ",
        "X",
        " ",
        "é",
    ]
)


def is_balanced(text: str, opening: str, closing: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == opening) - (character == closing)
        if depth < 0:
            return False
    return depth == 0


@given(st.lists(st.lists(words, max_size=12).map("".join), min_size=1, max_size=4))
def test_whole_files_are_read_as_line_by_line(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    texts = [text for text in texts if is_balanced(text, "(", ")") and is_balanced(text, "[", "]")]
    texts = [text for text in texts if len(tokenize(text))]
    path = tmp_path_factory.mktemp("listops") / "basic_train.tsv"
    path.write_bytes(HEADER + GOOD + "".join(f"{text}\t3\n" for text in texts).encode())
    split = read_tsv(path)
    for index, text in enumerate(texts, start=1):
        assert split.inputs[index].tolist() == tokenize(text).tolist()


def test_symbols_outside_the_vocabulary_are_unknown(tmp_path: Path):
    split = read(tmp_path, HEADER + GOOD + b"( [FIRST 3 12 X ] )\t3\n")
    assert split.inputs[0].tolist() == [12, 3, 10, 15]
    assert split.inputs[1].tolist() == [16, 4, 16, 16, 15]


@pytest.mark.parametrize(
    "text", ["[SM 12 3 ]", "[SM 1()2 3 ]", "[SM 1 2]", "[SMX 1 2 ]", "[MINX 1 ]", "[SM] 1", "M [SM 1 ]"]
)
def test_symbols_run_together_are_one_unknown_symbol(tmp_path: Path, text: str):
    tokens = read(tmp_path, HEADER + text.encode() + b"\t3\n").inputs[0]
    assert tokens.tolist() == tokenize(text).tolist()
    assert 16 in tokens


def test_an_expression_longer_than_the_model_takes_is_an_error(tmp_path: Path):
    write_files(tmp_path)
    with pytest.raises(
        ValueError, match=r"basic_train\.tsv, line 3: expected at most 8 tokens, got 9: raise max_length"
    ):
        read_listops(tmp_path, 8)
    assert read_listops(tmp_path, 9).max_length == 9


def count_parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    parsed: list[Path] = []

    def counting(path: Path) -> LabelledSplit:
        parsed.append(path)
        return read_tsv(path)

    monkeypatch.setattr(listops_reader, "read_tsv", counting)
    return parsed


def test_files_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parsed = count_parses(monkeypatch)
    write_files(tmp_path)
    first, second = read_listops(tmp_path), read_listops(tmp_path)
    assert len(parsed) == 3
    assert first.data_hash == second.data_hash
    assert second.train.inputs[1].tolist() == first.train.inputs[1].tolist()


def test_changed_files_are_parsed_again(tmp_path: Path):
    write_files(tmp_path)
    before = read_listops(tmp_path)
    path = write_files(tmp_path, GOOD + LONGER.replace(b"3 ) ] )", b"4 ) ] )")) / "basic_train.tsv"
    os.utime(path, ns=(0, 0))
    after = read_listops(tmp_path)
    assert after.train.inputs[1].tolist() == [12, 3, 13, 5, 8, 10, 15, 5, 15]
    assert after.data_hash != before.data_hash


@pytest.mark.parametrize("keep", [0, 10, 700, -1])
def test_a_damaged_copy_of_the_tokens_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int):
    parsed = count_parses(monkeypatch)
    write_files(tmp_path)
    data = read_listops(tmp_path)
    whole = (tmp_path / CACHE_NAME).read_bytes()
    (tmp_path / CACHE_NAME).write_bytes(whole[:keep])
    assert read_listops(tmp_path).data_hash == data.data_hash
    assert len(parsed) == 6
    assert read_listops(tmp_path).data_hash == data.data_hash
    assert len(parsed) == 6


def test_a_flipped_bit_in_the_copy_of_the_tokens_changes_no_data(tmp_path: Path):
    write_files(tmp_path)
    data = read_listops(tmp_path)
    whole = (tmp_path / CACHE_NAME).read_bytes()
    for position in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[position] ^= 9
        (tmp_path / CACHE_NAME).write_bytes(damaged)
        assert read_listops(tmp_path).data_hash == data.data_hash


def test_a_copy_that_cannot_be_written_is_done_without(tmp_path: Path):
    write_files(tmp_path)
    (tmp_path / CACHE_NAME).mkdir()
    assert len(read_listops(tmp_path).train) == 2
    assert sorted(os.listdir(tmp_path)) == ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv", CACHE_NAME]
