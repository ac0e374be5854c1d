"""Pages of what is counted: beside the catalogue's numbers, and nothing else beside them."""

import re

import pytest
from test_catalogue import cells, papers_columns, readable

from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.experiments.cells import counts
from replib.report import catalogue, counted

NETWORKS = {
    f"{name}/{key}": item
    for name, work in catalogue.catalogue().items()
    for key, item in work.items.items()
    if item.networks
}


def test_every_item_whose_networks_are_counted_says_so_and_no_other():
    said = {
        f"{name}/{key}"
        for name, work in catalogue.catalogue().items()
        for key, item in work.items.items()
        if "network-sizes" in item.here
    }
    assert said == {*NETWORKS, "repvgg/table2"}, "table 2 has stages; table 3 names the networks"


@pytest.mark.parametrize("reference", [name for name, item in NETWORKS.items() if item.counts])
def test_the_papers_columns_are_the_catalogues(reference, monkeypatch):
    made = dict.fromkeys((*counted.UNITS, "training_flops"), 0.125)
    monkeypatch.setattr(counted, "counted", lambda *network: made)
    item, page = NETWORKS[reference], counted.network_sizes(reference).data
    known = {
        f"{value}"
        for cell, column, value, confidence in cells()
        if cell.rpartition("/")[0] == reference
        and cell.rpartition("/")[2] in item.networks
        and column in item.counts.values()
        and readable(value, confidence)
    }
    assert {*papers_columns(page)} == known != set()
    assert page.count("%") >= len(item.networks), "an eighth is nobody's number"


def test_only_what_is_off_by_more_than_the_last_digit_differs():
    assert not counted.differs(8.309, 8.3) and not counted.differs(25.4999, 25.49)
    assert not counted.differs(79.9, 79) and counted.differs(80.1, 79)
    assert counted.differs(8.41, 8.3) and counted.differs(25.56, 25.53)


def test_stages_by_the_papers_terms():
    factors = {"a": 0.75, "b": 2.5}
    assert counted.layers_and_width("1 x min(64, 64a)", factors) == (1, 48)
    assert counted.layers_and_width("1 x min(64, 64a)", {"a": 2}) == (1, 64)
    assert counted.layers_and_width("14 x 256a", factors) == (14, 192)
    assert counted.layers_and_width("1 x 512b", factors) == (1, 1280)


def cells_of(page: str) -> list[list[str]]:
    """The lines of a page's table."""
    return [re.findall(r"<td>(.*?)</td>", line, re.S) for line in page.split("<tr>")[2:]]


@pytest.mark.slow
def test_the_layers_are_those_of_the_papers_tables(monkeypatch):
    paper = catalogue.work("repvgg").items
    few = {name: paper["table3"].networks[name] for name in ("repvgg_a0", "repvgg_b1")}
    monkeypatch.setitem(paper["table3"].__dict__, "networks", few)
    found = cells_of(counted.stages().data)
    assert [line[-1] for line in found] == ["yes", "yes"] and found[0][3] == found[0][4]
    assert found[0][3] == "1 × 48 · 2 × 48 · 4 × 96 · 14 × 192 · 1 × 1280"
    few["repvgg_a0"] = few["repvgg_b1"]
    assert [line[-1] for line in cells_of(counted.stages().data)] == ["<b>no</b>", "yes"]


@pytest.mark.slow
def test_a_network_is_counted_as_tables_count_it():
    one = NETWORKS["repvgg/table4"].networks["repvgg_a0"]
    found = counted.counted(one.network, one.classes, one.image_size)
    other = counts(one.network, one.classes, (3, 224, 224))
    assert found["flops"] == other["flops"] / 2e9 < found["training_flops"]
    for name in ("training_parameters", "parameters"):
        assert found[name] == other[name] / 1e6
    assert found["multiplications"] < found["flops"]


def test_rows_of_a_profile_are_costed(monkeypatch):
    """At full size, in both forms, of the variants that are named."""
    asked = []
    monkeypatch.setattr(counted, "cost", lambda *what: asked.append(what) or what)
    made = [*counted.of_rows("orepa-table4", "imagenet", 2, ["repvgg_a0"])]
    assert [row.label for row, *_ in made] == ["RepVGG-A0: RepVGG", "RepVGG-A0: OREPA"]
    assert [(what[0][:3], *what[1:]) for what in asked] == [
        (("repvgg_a0", block, 1.0), 2, 224, form)
        for block in ("repvgg", "orepa_repvgg")
        for form in (counted.ELSEWHERE, counted.HERE)
    ]
    with pytest.raises(UserError, match=r"no variant 'resnet19'; it has resnet18, resnet50"):
        [*counted.of_rows("orepa-table2", "imagenet", 2, ["resnet19"])]


@pytest.mark.slow
def test_a_step_costs_more_where_branches_merge_after_training():
    network = ("digits", "orepa", 1.0, (), (), ())
    apart, here = (
        counted.cost(network, 16, 32, form) for form in (counted.ELSEWHERE, counted.HERE)
    )
    plain = counted.cost(("digits", "convbn", 1.0, (), (), ()), 16, 32, counted.HERE)
    assert apart.parameters == here.parameters > plain.parameters
    assert apart.step > here.step > plain.step and apart.saved > here.saved > plain.saved


@pytest.mark.slow
def test_the_page_of_blocks_has_them_all():
    found = cells_of(counted.blocks(2, 8, 6).data)
    assert [line[0] for line in found] == [f"<b>{name}</b>" for name in BLOCKS]
    by_name = {line[0][3:-4]: line for line in found}
    assert by_name["convbn"][5:] == ["1.00"] * 4
    assert by_name["repvgg"][2] == "3" and by_name["repvgg"][4] == "584"
    branches = 2 * (8 * 8 * 9 + 8 * 8) * 36 * 3  # what two convolutions do, forward and backward
    assert by_name["repvgg"][5] == f"{branches / (2 * 8 * 8 * 9 * 36 * 3):.2f}" == "1.11"
