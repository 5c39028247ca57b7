from dataclasses import asdict

import pytest
from command_line import Invoke

from subquad.build import list_mixers, traits
from subquad.cli.list_mixers import Entry, render, select
from subquad.registry import MIXERS


def test_the_document_holds_what_the_registry_says(invoke: Invoke) -> None:
    entries = {entry["name"]: entry for entry in invoke("list", "--json").document}
    assert sorted(entries) == list_mixers()
    for name, entry in entries.items():
        config_class = MIXERS.lookup(name)
        assert (entry["family"], entry["placement"]) == (config_class.family, config_class.placement)
        assert entry["traits"] == asdict(traits(name))
        assert entry["summary"].endswith(".")


def test_traits_and_family_narrow_the_list(invoke: Invoke) -> None:
    named = invoke("list", "--trait", "causal", "--trait", "state", "--json").document
    assert sorted(entry["name"] for entry in named) == list_mixers(causal=True, state=True)
    sparse = invoke("list", "--family", "sparse", "--json").document
    assert {entry["family"] for entry in sparse} == {"sparse"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--family", "spars"], "unknown family 'spars'; did you mean 'sparse'?"),
        (["--trait", "casual"], "unknown trait 'casual'; did you mean 'causal'?"),
    ],
)
def test_an_unknown_filter_names_the_nearest(arguments: list[str], text: str, invoke: Invoke) -> None:
    ran = invoke("list", *arguments)
    assert ran.exit_code == 2
    assert text in ran.err


def test_every_mechanism_has_a_row_with_marks_below_the_names_of_the_traits(invoke: Invoke) -> None:
    lines = invoke("list").out.splitlines()
    for name in list_mixers():
        row = next(line for line in lines if line.startswith(f"  {name} "))
        for trait, has in asdict(traits(name)).items():
            step = next(line for line in lines if line.endswith(f"╭ {trait.replace('_', ' ')}"))
            assert row[step.index("╭")] == ("✓" if has else "·")


def test_an_empty_choice_says_so(invoke: Invoke) -> None:
    ran = invoke("list", "--trait", "causal", "--trait", "fixed_length", "--family", "dense")
    assert ran.exit_code == 0
    assert ran.out.strip() == "No mechanism of the family dense has causal and fixed_length."


def test_a_mechanism_that_can_not_be_built_by_default_has_unknown_traits() -> None:
    known = Entry("known", "sparse", "sublayer", "One.", {"causal": True})
    unknown = Entry("unknown", "sparse", "sublayer", "Two.", None)
    assert select([known, unknown], None, ["causal"]) == [known]
    assert render([known, unknown]).renderables
