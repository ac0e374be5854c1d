"""The wiring of a cell: what `run_cell` really trains, and what it says it did."""

import pytest
import torch

from replib.experiments.cells import (
    dataset,
    key_of,
    method_of,
    new_model,
    plan,
    recipe_of,
    run_cell,
    split_of,
    trained_model,
    versions_of,
)
from replib.experiments.params import (
    ADDED,
    Cell,
    DyRepParams,
    NarrowParams,
    QuantizedParams,
    RepOptParams,
    ResRepParams,
    Table,
    TransferParams,
)
from replib.experiments.store import Store, sha256
from replib.methods import cycle, distill
from replib.methods.distill import distillation_loss
from replib.models import BODY_VERSIONS
from replib.report.results import Results
from replib.training.augmentation import Augmentation
from replib.training.evaluation import Split, accuracy

CELL = dict(data="digits", train_images=60, held_out=20, body="digits", epochs=6, batch_size=20,
            learning_rate=2.0, clip_norm=10.0)  # fmt: skip
CYCLE = dict(learning_rate=0.3, phases=2, epochs=3, decay="weights", clip="decayed")


def row(start=None, teacher=None, **changes):
    return dict(label="row", start=start, teacher=teacher, set=changes)


ROWS = {
    "base": row(),
    "teacher": row(learning_rate=0.2),
    "control": row("base", **CYCLE, cycle=dict(warmup=2, restructure="none")),
    "official": row("base", **CYCLE, cycle=dict(warmup=2)),
    "preserving": row("base", **CYCLE, cycle=dict(warmup=2, fidelity="preserving")),
    "distilled": row("base", "teacher", distill=dict(alpha=0.9, temperature=4.0), epochs=2),
    "long": dict(label="row", as_long_as="control"),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(plan, store) of one seed of every kind of cell, trained in this process."""
    torch.set_num_threads(1)
    table = Table.model_validate(
        dict(title="t", question="q", control="control", seeds=[0], cell=CELL, rows=ROWS)
    )
    store, made = Store(tmp_path_factory.mktemp("store")), plan(table)
    for planned in made.cells.values():
        run_cell(planned, made.cells, store)
    return made, store


def of(ran, name):
    made, store = ran
    planned = made.cells[made.by_row[name, 0]]
    return planned, store.read(planned.key)["result"]


@pytest.mark.parametrize("name", ROWS)
def test_the_reported_accuracy_is_that_of_the_selected_epoch(ran, name):
    _planned, result = of(ran, name)
    selected = result["final"]["selected_epoch"]
    logged = result["history"]["test_accuracy"][selected]
    assert result["deployed"]["test_accuracy"] == logged == result["final"]["selected"]
    validation = result["history"]["validation_accuracy"]
    assert selected == max(range(len(validation)), key=lambda i: (validation[i], i))


def test_at_least_one_selected_epoch_is_not_the_last(ran):
    """Otherwise the test above could not tell them apart."""
    results = [of(ran, name)[1] for name in ROWS]
    assert any(r["final"]["selected"] != r["final"]["last"] for r in results)


def test_the_stored_weights_are_the_selected_ones(ran):
    _made, store = ran
    planned, result = of(ran, "base")
    data = dataset(planned.cell)
    model = trained_model(planned, store)
    now = accuracy(model, Split.test(data, "cpu"))
    assert now == pytest.approx(result["final"]["selected"], abs=2 / 797)


def test_restarts_are_measured(ran):
    names = ("control", "official", "preserving")
    jumps = {name: of(ran, name)[1]["restarts"]["jump_eval"] for name in names}
    assert min(jumps["official"]) > 0.05
    assert max(jumps["preserving"]) < 1e-4  # float32 rounding, amplified by small slopes
    assert jumps["control"][0] == 0.0


def test_distillation_follows_the_real_teacher(ran, monkeypatch):
    """Without augmentation, an epoch's teacher logits are those of the training images."""
    made, store = ran
    planned, result = of(ran, "distilled")
    assert result["compute"]["teacher_flops"] > 0
    seen, losses = [], []

    def watched(logits, taught, labels, **options):
        assert options == {"alpha": 0.9, "temperature": 4.0}
        seen.append(taught)
        losses.append(distillation_loss(logits, taught, labels, **options))
        return losses[-1]

    monkeypatch.setattr(distill, "distillation_loss", watched)
    run_cell(planned, made.cells, store)
    assert store.read(planned.key)["result"] == result
    data = dataset(planned.cell)
    images = data.normalised(data.train_images[split_of(planned.cell).train])
    with torch.no_grad():
        want = trained_model(made.cells[planned.cell.teacher], store)(images)
    epoch = torch.cat(seen[-2:])  # 40 images in two batches
    torch.testing.assert_close(epoch.sort(0).values, want.sort(0).values, rtol=1e-4, atol=1e-4)
    assert losses[-1].requires_grad and want.std() > 0.01


def test_a_split_seed_gives_every_seed_the_same_images():
    def images(**given):
        return [split_of(Cell.model_validate(CELL | {"seed": seed} | given)) for seed in (0, 1)]

    for protocol in ("clean", "paper"):
        one, two = images(split_seed=7, protocol=protocol)
        assert torch.equal(one.train, two.train) and torch.equal(one.validation, two.validation)
    own, other = images()
    assert not torch.equal(own.train, other.train) and not torch.equal(own.train, one.train)
    assert torch.equal(own.train, images(split_seed=0)[1].train)


def test_every_seed_draws_its_own_initialisation_split_and_redraw():
    one, two = (Cell.model_validate(CELL | {"seed": seed}) for seed in (0, 1))
    first, second = (new_model(cell).state_dict() for cell in (one, two))
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
    assert all(torch.equal(v, new_model(one).state_dict()[k]) for k, v in first.items())
    made = [
        method_of(cell.model_copy(update={"cycle": Cell.model_validate(
            CELL | {"seed": 0, "cycle": {"warmup": 2}}).cycle}), new_model(cell))
        for cell in (one, two)
    ]  # fmt: skip
    assert made[0].seed != made[1].seed


def test_as_long_as_counts_the_parents_epochs(ran):
    planned, _ = of(ran, "long")
    assert planned.epochs == 6 + 2 * 3 and planned.cell.phases == 1


def test_a_key_names_everything_that_a_result_depends_on(monkeypatch):
    cell = Cell.model_validate(CELL | {"seed": 0, "cycle": {"warmup": 2}})
    keys = {key_of(cell, "digest")}
    keys.add(key_of(cell, "another digest"))
    for changes in ({"seed": 1}, {"learning_rate": 0.1}, {"block": "acb"}, {"start": "a" * 64}):
        keys.add(key_of(cell.model_copy(update=changes), "digest"))
    assert len(keys) == 6
    assert key_of(cell.model_copy(update={"data_dir": "elsewhere"}), "digest") in keys
    monkeypatch.setattr(cycle, "VERSION", cycle.VERSION + 1)
    keys.add(key_of(cell, "digest"))
    monkeypatch.setitem(BODY_VERSIONS, "digits", 2)
    keys.add(key_of(cell, "digest"))
    assert len(keys) == 8 and versions_of(cell)["body:digits"] == 2


FIRST = """
    data data_dir image_size train_images held_out protocol seed body block phases epochs
    batch_size learning_rate momentum nesterov weight_decay decay clip_norm clip
    crop_padding flip next_start cycle distill start teacher
"""


def test_a_new_key_is_among_those_that_change_no_older_key():
    assert set(Cell.model_fields) - ADDED == set(FIRST.split()), "a new key goes into ADDED"


def test_a_new_key_at_its_default_changes_no_key():
    """Cells that were trained before a key existed keep theirs; where it is set it counts."""
    cell = Cell.model_validate(CELL | {"seed": 0, "crop_padding": 2})
    before = {name: value for name, value in cell.model_dump().items() if name not in ADDED}
    del before["data_dir"]
    versions = versions_of(cell)
    assert key_of(cell, "d") == sha256({"parameters": before, "data": "d", "versions": versions})
    changes = dict(precision="bfloat16", resized_crop=8, crop_area=[0.2, 1.0], cutout=2, mixup=0.1,
                   crop_ratio=[0.5, 2.0], crop_interpolation="bicubic", policy="v0", cutmix=0.1,
                   policy_interpolation="bicubic", fill=[128], brightness=0.1, contrast=0.1,
                   saturation=0.1, hue=0.1, lighting=0.1, erasing=0.1, mix_each=True,
                   label_smoothing=0.1, width=0.5, image_resize=9, classes=5, drop_last=True,
                   accumulate=2, learning_rate_decay=0.5, schedule="steps", rate_per="step",
                   minimum_rate=0.1, milestones=[1], milestone_factor=0.2, warmup_epochs=1,
                   warmup_steps=1, warmup_rate=0.1, warmup_per="epoch", warmup_counts=False,
                   late_steps=1, optimizer="adamw", betas=[0.8, 0.9], epsilon=0.1, ema=0.9,
                   carry_momentum=True, bias_rate=2.0, teacher_mean=[0.5],
                   teacher_deviation=[0.5], initialisation="fan_out",
                   dyrep=DyRepParams(interval=1, last_epoch=1), views=["rotated_90"],
                   block_options={"identity": False}, plain_sizes=[1],
                   resrep=ResRepParams(target=0.5), narrow=NarrowParams(target=0.5, rule="uniform"),
                   search=True, repopt=RepOptParams(), scales="a" * 64,
                   body_options={"depths": [1]}, receptive_field=32, split_seed=1,
                   transfer=TransferParams(head="fcn"), quantized=QuantizedParams())  # fmt: skip
    cycles = dict(blocks=["stages.0.*"], calibrate=True)
    assert changes.keys() | {f"cycle.{name}" for name in cycles} == ADDED
    keys = {key_of(cell.model_copy(update={k: v}), "d") for k, v in changes.items()}
    assert len(keys | {key_of(cell, "d")}) == len(changes) + 1
    turning = Cell.model_validate(CELL | {"seed": 0, "cycle": {"warmup": 2}})
    first = turning.in_key["cycle"]
    assert cycles.keys().isdisjoint(first)
    for name, value in cycles.items():
        changed = turning.model_copy(
            update={"cycle": turning.cycle.model_copy(update={name: value})}
        )
        assert changed.in_key["cycle"] == first | {name: value}


def test_an_augmented_cell_in_bfloat16(tmp_path, monkeypatch):
    """What is asked for reaches the loop and stands in the evidence; how it was compiled too,
    which is no part of the key."""
    settings = dict(seed=0, epochs=1, precision="bfloat16", crop_padding=1, label_smoothing=0.1)
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL,
             rows={"a": row(**{k: v for k, v in settings.items() if k != "seed"})})
    )  # fmt: skip
    made, store = plan(table), Store(tmp_path)
    (planned,) = made.cells.values()
    recipe = recipe_of(planned.cell)
    assert recipe.precision == "bfloat16"
    assert recipe.augmentation == Augmentation(crop_padding=1, label_smoothing=0.1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = {}
    for mode in ("none", "default"):
        run_cell(planned, made.cells, store, compile=mode)
        found[mode] = store.read(planned.key)
        context = found[mode]["context"]
        assert (context["compile"], context["precision"]) == (mode, "bfloat16")
        assert context["evaluation_precision"] == "float32"
    assert found["none"]["result"] == found["default"]["result"]
    assert found["none"]["result"]["parameters"]["label_smoothing"] == 0.1


def test_gains_are_over_the_row_that_is_named_and_proxies_are_not_comparable():
    results = Results("table2", "quick")
    assert results.against("preserving") == "control_constant"
    assert results.against("official") == "control"
    assert results.against("official_distilled") == "control_distilled"
    assert results.verdict("official") in ("not comparable", "not run")
    changed = Results(
        "table2",
        "quick",
        ["proxy=null", "rows.official.paper={row: dbb/table2/cifar_10_vgg_16, gain: gain}"],
    )
    assert changed.verdict("official") in ("not comparable", "not run")
