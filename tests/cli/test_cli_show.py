from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import Invoke

from subquad.build import cost, list_mixers, mixer_config, traits
from subquad.cli.pattern_page import is_pattern
from subquad.cli.picture import framed, picture_lines
from subquad.cli.price import price_of
from subquad.patterns.expression import parse_pattern
from subquad.records.mechanisms import Picture

LOCAL_CAUSAL = [
    "10000000",
    "11000000",
    "11100000",
    "01110000",
    "00111000",
    "00011100",
    "00001110",
    "00000111",
]

OWN = '''
from dataclasses import dataclass
from subquad.mechanisms.local import LocalConfig

@dataclass(frozen=True, kw_only=True)
class NearConfig(LocalConfig):
    """Attention to the nearest tokens only."""

    reach: int = 2
    """How far a token looks."""
'''


@pytest.mark.parametrize("arguments", [("local:window=3",), ("local", "--set", "window=3")])
def test_the_picture_of_causal_local_attention_is_exact(arguments: tuple[str, ...], invoke: Invoke) -> None:
    document = invoke("show", *arguments, "--picture", "8", "--json").document
    assert document["pictures"]["causal"] == LOCAL_CAUSAL
    assert document["pictures"]["bidirectional"][0] == "11000000"
    assert "window" not in document["drawn_with"]


def test_the_picture_is_drawn_in_half_blocks(invoke: Invoke) -> None:
    picture = Picture(length=8, rows=tuple(LOCAL_CAUSAL))
    expected = ["█▄      ", "▀██▄    ", "  ▀██▄  ", "    ▀██▄"]
    assert picture_lines(picture) == expected
    out = invoke("show", "local:window=3", "--picture", "8").out
    assert all(f"│{line}│" in out for line in expected)
    assert any(line.split() == ["bidirectional", "causal"] for line in out.splitlines())


def test_an_odd_number_of_rows_ends_in_half_a_line() -> None:
    assert picture_lines(Picture(length=1, rows=("1",))) == ["▀"]
    assert framed(Picture(length=3, rows=("100", "110", "111")), "causal").plain.splitlines() == [
        " causal",
        "┌───┐",
        "│█▄ │",
        "│▀▀▀│",
        "└───┘",
    ]


def test_the_document_holds_what_the_registry_says(invoke: Invoke) -> None:
    document = invoke("show", "local", "--set", "window=17", "--length", "1024", "--json").document
    assert document["traits"] == asdict(traits("local", window=17))
    assert document["price"]["cost"] == asdict(cost("local", length=1024, embed_dim=512, num_heads=8, window=17))
    assert document["price"]["dense_cost"] == asdict(cost("full", length=1024, embed_dim=512, num_heads=8))
    (window,) = (option for option in document["options"] if option["name"] == "window")
    assert window.pop("description").startswith("W, keys that a token sees")
    assert window == {"name": "window", "type": "int", "default": 129, "required": False, "value": 17}
    assert "arXiv:1802.05751" in document["paper"]


@pytest.mark.parametrize("name", list_mixers())
def test_every_mechanism_can_be_shown(name: str, invoke: Invoke) -> None:
    ran = invoke("show", name, "--picture", "6", "--length", "256")
    assert ran.exit_code == 0, ran.err
    for heading in ("Paper", "Formula", "Options", "Traits", "Price of one layer", "Who attends whom"):
        assert heading in ran.out


def test_sizes_made_small_for_the_picture_are_named(invoke: Invoke) -> None:
    assert "Drawn small, with window=5" in " ".join(invoke("show", "longformer").out.split())
    assert "Drawn small" not in invoke("show", "longformer:window=129").out


def test_an_even_window_is_shown_in_the_form_that_has_it(invoke: Invoke) -> None:
    document = invoke("show", "local:window=4", "--causal", "--picture", "6", "--json").document
    assert list(document["pictures"]) == ["causal"]
    assert document["price"]["causal"] is True


def test_the_lengths_where_the_prices_cross_are_exact() -> None:
    config, sizes = mixer_config("local", window=129), {"length": 4096, "embed_dim": 512, "num_heads": 8}
    price = price_of(config, **sizes, causal=False)

    def flops(name: str, length: int) -> int:
        return cost(name, length=length, embed_dim=512, num_heads=8).flops

    assert price.cheaper_from == 66
    assert flops("local", 66) < flops("full", 66)
    assert flops("local", 65) == flops("full", 65)
    # 8 L D² + 4 L² D of dense attention against 16 L D² of the feed-forward: L = 2 D.
    assert price.dense_overtakes_feedforward == 1024
    assert price.overtakes_feedforward is None


def test_dense_attention_is_not_compared_with_itself(invoke: Invoke) -> None:
    out = invoke("show", "full", "--causal").out
    assert "full / full" not in out
    assert "state in generation" in out


def test_a_mechanism_of_the_users_own_is_shown(tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "near.py"
    path.write_text(OWN)
    document = invoke("show", f"{path}:NearConfig", "--set", "reach=3", "--picture", "6", "--json").document
    assert document["summary"] == "Attention to the nearest tokens only."
    assert document["paper"] == "user's own mechanism"
    options = {option["name"]: option for option in document["options"]}
    assert options["reach"]["value"] == 3
    assert options["reach"]["description"] == "How far a token looks."
    assert options["window"]["description"].startswith("W, keys that a token sees")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lokal"], "unknown token mixer 'lokal'; did you mean 'local'?"),
        (["local", "--set", "windw=3"], "local: unknown option 'windw'; did you mean 'window'?"),
        (["local", "--set", "window"], "expected options as name=value behind a colon, got 'window'"),
        (["local:window=4"], "must be odd; got 4, use 3 or 5"),
        (["linformer", "--causal"], "linformer: causal=True is not supported; mechanisms that support it: "),
        (["local", "--embed-dim", "30"], "embed_dim=30 is not divisible by num_heads=8"),
        (["local", "--length", "0"], "--length must be at least 1 token, got 0"),
        (["local", "--picture", "513"], "a picture of who attends whom has 1 to 512 tokens, got 513"),
        (["./nowhere.py:MyConfig"], "nowhere.py: no such file"),
    ],
)
def test_what_can_not_be_shown_says_why(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke("show", *arguments)
    assert ran.exit_code == 2
    assert text in ran.err


PATTERN = "Causal() & (Window(2, 0) | Strided(4))"


def test_a_pattern_is_shown_as_it_is_defined(invoke: Invoke) -> None:
    document = invoke("show", PATTERN, "--picture", "8", "--json").document
    rows = ["".join("01"[seen] for seen in row) for row in parse_pattern(PATTERN).dense(8).tolist()]
    counts = {"visible_pairs": 25, "least_keys": 1, "most_keys": 4, "queries_without_keys": 0}
    assert document == {
        "pattern": PATTERN,
        "causal": True,
        "length": 8,
        "counts": {"all heads": counts},
        "pictures": {"all heads": rows},
    }


def test_more_tokens_of_a_pattern_are_counted_than_drawn(invoke: Invoke) -> None:
    document = invoke("show", PATTERN, "--picture", "8", "--length", "100000", "--json").document
    # A window of 3 and every 4th key before it: 3 L - 3 pairs, and i // 4 for query i.
    pairs = 3 * 100_000 - 3 + sum(i // 4 for i in range(100_000))
    assert document["counts"]["all heads"]["visible_pairs"] == pairs
    assert document["length"] == 100_000
    assert len(document["pictures"]["all heads"]) == 8


def test_the_page_of_a_pattern_counts_and_draws(invoke: Invoke) -> None:
    out = invoke("show", "Window(1, 0) & ~Window(0, 0)", "--picture", "4").out
    assert "4 tokens; no query sees a later key" in out
    counts = next(line for line in out.splitlines() if line.startswith("all heads"))
    assert counts.split() == ["all", "heads", "3", "18.8", "%", "0", "to", "1", "1"]
    assert all(line in out for line in ("│▄   │", "│ ▀▄ │"))


def test_heads_of_a_pattern_are_shown_one_by_one(invoke: Invoke) -> None:
    document = invoke("show", "Causal().heads({1: Window(0, 1)})", "--picture", "3", "--json").document
    assert document["pictures"] == {"head 0": ["100", "110", "111"], "head 1": ["110", "011", "001"]}
    assert document["causal"] is False


def test_a_picture_that_is_too_wide_for_the_terminal_says_what_to_do(invoke: Invoke) -> None:
    assert "258 columns are needed here; --picture draws fewer tokens" in invoke("show", "Block(64)").out


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *((text, True) for text in ("Causal()", "~ (Log() | Sink(2))", "Windw(3)", "Causal", "sink(2)")),
        *((text, False) for text in ("local", "local:window=3", "./mine.py:Near", "./a(1).py:Near", "a(1).py:Near")),
    ],
)
def test_patterns_are_told_from_names_of_mechanisms(name: str, pattern: bool) -> None:
    assert is_pattern(name) == pattern


@pytest.mark.parametrize("name", ["local", PATTERN])
@pytest.mark.parametrize("file_name", ["picture.svg", "picture.png"])
def test_the_picture_is_written_to_a_file(name: str, file_name: str, tmp_path: Path, invoke: Invoke) -> None:
    light, dark = tmp_path / file_name, tmp_path / f"dark-{file_name}"
    ran = invoke("show", name, "--picture", "8", "--json", "--output", str(light))
    assert ran.document["pictures"]
    assert ran.err.strip() == f"picture: {light}"
    assert invoke("show", name, "--picture", "8", "--output", str(dark), "--dark").exit_code == 0
    assert light.read_bytes() != dark.read_bytes()
    start = b"<svg" if light.suffix == ".svg" else b"\x89PNG"
    assert light.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["Causal() & Windw(3)"], "'Windw(3)' at character 12 of the pattern: there is no such pattern; did you mean"),
        (["Causal() &"], "the pattern can't be read: invalid syntax at character 11"),
        (["Causal()", "--set", "window=3"], "--set speaks of a mechanism; a pattern holds its numbers itself"),
        (["Log()", "--causal"], "--causal speaks of a mechanism; write 'Causal() & (Log())' instead"),
        (["Log()", "--length", "0"], "--length must be at least 1 token, got 0"),
        (["Causal()", "--picture", "0"], "a picture of who attends whom has 1 to 512 tokens, got 0"),
        (["local", "--output", "picture.pdf"], "expected a file name that ends with .png or .svg, got 'picture.pdf'"),
        (["Causal()", "--output", "nowhere/picture.svg"], "cannot use nowhere/picture.svg: No such file or directory"),
    ],
)
def test_what_can_not_be_drawn_says_why(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke("show", *arguments)
    assert ran.exit_code == 2
    assert text in " ".join(ran.err.split())
