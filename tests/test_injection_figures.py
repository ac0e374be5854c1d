"""What a page says of dense maps is what their weights are; the paper's networks are counted."""

import re

import pytest
import torch
from conftest import at_home
from test_repmlp import build

from replib.experiments.cells import counts, new_model
from replib.experiments.params import network_of
from replib.report import injection_figures
from replib.report.injection_figures import Injection, first_block, maps, profile
from replib.report.page import Page

torch.set_num_threads(1)

TABLE = """
title: "Local"
question: "Or not?"
method: "See."
control: none
seeds: [0, 1]
cell: {data: digits, image_size: 32, train_images: 60, held_out: 20, batch_size: 20}
recipes: {base: {body: cifar_repmlpnet, block: convbn, width: 0.25, epochs: 1, learning_rate: 0.1}}
rows:
  none: {label: "No <convolution>", use: [base], set: {body_options: {sizes: []}}}
  both: {label: "Both", use: [base], set: {body_options: {sizes: [1, 3]}}}
networks:
  a:
    {label: "A <1>", body: resmlp12, image_size: 32, classes: 100,
     paper: {row: repopt/table1/b1, parameters: params_m}}
  b:
    {label: "B", body: digits, image_size: 8, classes: 10,
     paper: {row: repmlp/table2/repmlpnet_t224, flops: flops_b}}
"""


def test_weights_by_distance_are_means_over_pairs():
    block = build(sets=2)
    parts = maps(block)
    total = sum(parts.values())
    torch.testing.assert_close(total.flatten(), block.merged().weight.flatten())
    sums, pairs = [0.0] * 4, [0] * 4
    for out in range(12):
        for into in range(12):
            steps = max(abs(out // 4 - into // 4), abs(out % 4 - into % 4))
            sums[steps] += total[:, out, into].abs().mean().item()
            pairs[steps] += 1
    means = [s / p for s, p in zip(sums, pairs, strict=True)]
    expected = [mean / (sum(sums) / 144) for mean in means]
    assert profile(total, 3, 4).tolist() == pytest.approx(expected)
    assert profile(parts["3x3"], 3, 4)[2:].abs().max() == 0


def test_counts_are_those_of_the_deployed_network():
    network = network_of("digits", "repvgg", 1.0, None, None, None)
    found = counts(network, 10, (3, 8, 8))
    # By hand: 3x3 from 3 to 8, 8 to 16 (strided), 16 to 16, 16 to 32 (strided) channels, then 10.
    layers = [(3, 8, 64), (8, 16, 16), (16, 16, 16), (16, 32, 4)]
    weights = sum(9 * i * o for i, o, _ in layers)
    biases = sum(o for _, o, _ in layers)
    assert found["parameters"] == weights + biases + 32 * 10 + 10
    assert found["flops"] == 2 * (sum(9 * i * o * pixels for i, o, pixels in layers) + 320)
    side = sum(i * o for i, o, _ in layers)
    norms = 2 * 2 * biases + 2 * 16  # two each, and that of the only identity
    assert found["training_parameters"] == weights + side + norms + 330


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with at_home(tmp_path_factory.mktemp("project"), {"local": TABLE}):
        yield Page("local", "tiny")


def test_a_page_counts_the_papers_networks_and_draws_their_blocks(made):
    html = made.counts().data
    lines = [re.findall(r"<td>(.*?)</td>", line) for line in html.split("<tr>")[2:]]
    count = counts(network_of("resmlp12", "convbn", 1.0, None, None, None), 100, (3, 32, 32))
    a, b = lines
    assert a[0] == "<b>A &lt;1&gt;</b>" and a[1] == "32 × 32"
    assert a[3:5] == [f"{count['parameters'] / 1e6:.2f}", "51.8"]
    assert a[5:] == [f"{count['flops'] / 2e9:.2f}", "–"] and b[-1] == "2.79"
    assert "accuracy in the paper" not in html  # nothing is stated
    assert "fully connected" in made.block().data
    assert "sizes = [1, 3]" in made.costs().data


def test_kernels_are_drawn_as_initialised_until_there_are_trained_ones(made, monkeypatch):
    before = Injection(made.results)
    assert before.locality() is None and "not on this machine" in before.said().data
    figure = before.kernels()
    assert "as initialised" in figure.get_suptitle() and len(figure.axes) == 3 * 4 + 1
    trained = {}  # which the rest of the page's tests train

    def weights(planned, store):
        return trained.setdefault(planned.key, new_model(planned.cell).eval())

    monkeypatch.setattr(injection_figures, "trained_model", weights)
    after = Injection(made.results)
    assert "4 networks" in after.said().data
    assert "Both, seed 0, the selected weights" in after.kernels().get_suptitle()
    _, block = after.example()
    shown = after.kernels().axes[3].images[0].get_array()  # the corner's, in the last column
    deployed = sum(maps(block).values())[0, 0]
    assert shown.flatten().tolist() == pytest.approx(deployed.tolist())
    lines = after.locality().axes[0].lines
    curves = []
    for seed in (0, 1):
        key = after.results.plan.by_row["none", seed]
        block = first_block(trained[key])
        curves.append(profile(sum(maps(block).values()), 8, 8))
    assert lines[0].get_ydata().tolist() == pytest.approx(((curves[0] + curves[1]) / 2).tolist())
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "-"]
