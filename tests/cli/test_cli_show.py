from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import Invoke

from subquad.build import cost, list_mixers, mixer_config, traits
from subquad.cli.picture import framed, picture_lines
from subquad.cli.price import price_of
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
    assert document["drawn_with"] == {}


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
    assert document["options"] == [
        {
            "name": "window",
            "type": "int",
            "default": 129,
            "required": False,
            "description": "W, keys that a token sees, itself included; odd unless causal.",
            "value": 17,
        }
    ]
    assert "arXiv:1802.05751" in document["paper"]


@pytest.mark.parametrize("name", list_mixers())
def test_every_mechanism_can_be_shown(name: str, invoke: Invoke) -> None:
    ran = invoke("show", name, "--picture", "6", "--length", "256")
    assert ran.exit_code == 0, ran.err
    for heading in ("Paper", "Formula", "Options", "Traits", "Price of one layer", "Who attends whom"):
        assert heading in ran.out


def test_sizes_made_small_for_the_picture_are_named(invoke: Invoke) -> None:
    assert "Drawn small, with window=5" in " ".join(invoke("show", "local").out.split())
    assert "Drawn small" not in invoke("show", "local:window=129").out


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
