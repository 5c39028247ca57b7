"""`subquad show --error`: the table, the document, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Invoke
from safetensors.torch import save_file

from subquad.build import list_mixers

SMALL = ("--length", "32", "--embed-dim", "32", "--num-heads", "2", "--picture", "4")


@pytest.fixture
def qkv(tmp_path: Path) -> str:
    path = tmp_path / "mine.safetensors"
    save_file({name: torch.randn(2, 20, 8) for name in "qkv"}, path)
    return str(path)


def test_the_document_holds_every_point(invoke: Invoke) -> None:
    points = invoke("show", "performer", "--error", "--option", "features=8,64", *SMALL, "--json").document["errors"]
    assert [(point["options"], point["source"], point["length"]) for point in points] == [
        ({"features": features}, f"N(0, {scale}²)", 32) for scale in ("0.25", "0.5", "1") for features in (8, 64)
    ]
    assert all(0 < point["mean"] <= point["worst"] and point["averaging"] > 0 for point in points)


def test_the_table_aligns_and_holds_what_the_document_holds(invoke: Invoke) -> None:
    asked = ("show", "performer", "--error", "--option", "features=8,64", *SMALL)
    points, out = invoke(*asked, "--json").document["errors"], invoke(*asked).out
    table = out[out.index("Error against softmax attention") :].splitlines()
    (head,) = (line for line in table if "features" in line)
    assert head.split() == ["tokens", "features", *["mean", "worst"] * 3]
    for features in (8, 64):
        (row,) = (line for line in table if line.split()[:2] == ["32", str(features)])
        figures = [point for point in points if point["options"] == {"features": features}]
        assert row.split()[2:] == [f"{point[name]:.3f}" for point in figures for name in ("mean", "worst")]
        for title in ("tokens", "features", "worst"):
            assert row[head.index(title) + len(title) - 1].isdigit()
    (averaging,) = (line for line in table if line.split()[:1] == ["averaging"])
    assert averaging.split()[1:] == [f"{point['averaging']:.3f}" for point in points[::2]]


def test_without_asking_there_is_no_such_part(invoke: Invoke) -> None:
    assert "errors" not in invoke("show", "performer", *SMALL, "--json").document
    assert "Error against" not in invoke("show", "performer", *SMALL).out


def test_options_that_cost_are_turned_by_themselves(invoke: Invoke) -> None:
    points = invoke("show", "performer:features=6", "--error", *SMALL, "--json").document["errors"]
    assert {point["options"]["features"] for point in points} == {3, 6, 12}


def test_several_options_have_a_table_each(invoke: Invoke) -> None:
    turned = ("--option", "features=4", "--option", "seed=0,1")
    out = invoke("show", "performer", "--error", *turned, *SMALL).out
    assert [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["tokens"]] == ["features", "seed"]


def test_own_queries_keys_and_values_are_measured(qkv: str, invoke: Invoke) -> None:
    asked = ("show", "full", "--error", "--qkv", qkv, "--picture", "4")
    (point,) = invoke(*asked, "--json").document["errors"]
    assert (point["source"], point["length"], point["options"]) == ("mine.safetensors", 20, {})
    assert point["mean"] < 1e-5
    assert invoke(*asked, "--length", "7", "--json").document["errors"][0]["length"] == 7
    out = invoke(*asked).out
    assert "mine.safetensors" in out
    assert out.splitlines()[-2].split()[0] == "20"


APPROXIMATIONS = ("combiner", "linformer", "nystromformer", "performer", "reformer", "topk")


@pytest.mark.parametrize("name", sorted({*APPROXIMATIONS, *list_mixers(approximates_softmax=True)}))
def test_every_approximation_has_a_table(name: str, invoke: Invoke) -> None:
    ran = invoke("show", name, "--error", *SMALL)
    assert ran.exit_code == 0, ran.err
    assert "Error against softmax attention" in ran.out


def test_what_is_left_out_of_the_measurement_is_said(invoke: Invoke) -> None:
    page = " ".join(invoke("show", "nystromformer", "--error", *SMALL).out.split())
    assert "Measured with kernel=0: the convolution is added to attention" in page


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["gmlp", "--error"], "gmlp: its error can't be measured, since it is a whole block, not attention"),
        (["nystromformer:kernel=0", "--error", "--causal"], "nystromformer: causal=True is not supported"),
        (["performer", "--error", "--option", "featurs=3"], "unknown option 'featurs'; did you mean 'features'?"),
        (["performer", "--error", "--option", "features=a"], "expected whole numbers as features=64,128,256, got"),
        (["performer", "--error", "--option", "features=0"], "performer: features must be at least 1, got 0"),
        (["performer", "--option", "features=3"], "--option goes with --error"),
        (["performer", "--qkv", "mine.safetensors"], "--qkv goes with --error"),
        (["performer", "--error", "--qkv", "nowhere.safetensors"], "cannot use nowhere.safetensors: No such file"),
        (["Causal()", "--error"], "--error speaks of a mechanism; a pattern approximates nothing"),
    ],
)
def test_what_can_not_be_measured_says_why(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke("show", *arguments)
    assert ran.exit_code == 2
    assert text in " ".join(ran.err.split())


def test_more_tokens_than_were_given_are_refused(qkv: str, invoke: Invoke) -> None:
    ran = invoke("show", "full", "--error", "--qkv", qkv, "--length", "21")
    assert ran.exit_code == 2
    assert "--length=21 exceeds the 20 tokens of mine.safetensors" in ran.err


def test_a_file_of_another_kind_is_refused(tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"no tensors")
    ran = invoke("show", "full", "--error", "--qkv", str(path))
    assert ran.exit_code == 2
    assert "mine.pt: not a safetensors file" in ran.err
