"""A params file or a `--set` either gives a table, or one line that says what to change.

Never another exception, and never anything executed.
"""

import math
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from replib.errors import UserError
from replib.experiments.params import Table, apply_settings, load_table, merged, parse_yaml

QUICK = ROOT / "params" / "table2" / "quick.yaml"
PROFILES = sorted(ROOT.glob("params/*/*.yaml"))

# what is set, and what the line must name
BAD_SETTINGS = {
    "unknown": ("foo=1", ["foo (=1)", "no such key", "seeds"]),
    "unknown, of a cell": ("cell.foo=1", ["cell.foo (=1)", "no such key", "batch_size"]),
    "unknown, of a cycle": ("recipes.base.cycle={foo: 1}", ["base.cycle.foo (=1)", "warmup"]),
    "unknown, of a row": ("rows.control.foo=1", ["rows.control.foo (=1)", "label"]),
    "unknown, in a recipe nobody uses": ("recipes.spare={foo: 1}", ["recipes.spare.foo (=1)"]),
    "misspelt": ("cell.batchsize=3", ["cell.batchsize (=3)", "perhaps batch_size is meant"]),
    "misspelt, of a cycle": ("recipes.cycles.cycle.warmpu=1", ["perhaps warmup is meant"]),
    "duplicate": ("cell={body: digits, body: digits}", ["'body' stands twice"]),
    "text for a number": ("recipes.base.epochs=many", ["recipes.base.epochs (='many')", "integer"]),
    "fraction for a count": ("recipes.base.epochs=1.5", ["base.epochs (=1.5)", "integer"]),
    "number for a switch": ("cell.flip=1", ["cell.flip (=1)", "boolean"]),
    "truth for a number": ("cell.batch_size=true", ["cell.batch_size (=True)", "integer"]),
    "number for a text": ("rows.control.label=3", ["rows.control.label (=3)", "string"]),
    "number for a mapping": ("cell=3", ["cell (=3)", "dictionary"]),
    "number for a group": ("cell.cycle=3", ["cell.cycle (=3)", "dictionary"]),
    "mapping for a number": ("recipes.base.epochs={a: 1}", ["recipes.base.epochs", "integer"]),
    "null for a number": ("recipes.cycles.phases=", ["recipes.cycles.phases (=None)", "integer"]),
    "null for the rows": ("rows=", ["rows (=None)"]),
    "infinite": ("cell.weight_decay=.inf", ["cell.weight_decay (=inf)", "finite"]),
    "minus infinite": ("cell.clip_norm=-.inf", ["cell.clip_norm (=-inf)"]),
    "not a number": ("recipes.base.learning_rate=.nan", ["base.learning_rate (=nan)", "finite"]),
    "overflowing": ("recipes.base.learning_rate=1e400", ["learning_rate (=inf)", "finite"]),
    "a number where the catalogue is named": ("rows.control.paper=70.1", ["control.paper (=70.1)"]),
    "below the range": ("recipes.base.epochs=0", ["recipes.base.epochs (=0)", "greater"]),
    "negative": ("seeds=[-1]", ["seeds.0 (=-1)", "greater"]),
    "above the range": ("cell.momentum=1.5", ["cell.momentum (=1.5)", "less"]),
    "far above": ("cell.batch_size=1000000000000", ["cell.batch_size", "less"]),
    "too long to print": ("seeds=[0x" + "f" * 5000 + "]", ["seeds.0", "less"]),
    "warm-up of nothing": ("recipes.cycles.cycle.warmup=0", ["recipes.cycles.cycle.warmup (=0)"]),
    "frozen for ever": ("recipes.cycles.cycle.warmup=20", ["warmup (=20)", "epochs (=20)"]),
    "not one of": ("cell.block=repvg", ["cell.block (='repvg')", "'repvgg'"]),
    "nesterov alone": ("cell.nesterov=true", ["nesterov (=true)", "momentum"]),
    "nothing held out": ("cell.held_out=0", ["held_out (=0)", "train_images (=200)"]),
    "all held out": ("cell.held_out=200", ["held_out (=200)", "train_images (=200)"]),
    "no seeds": ("seeds=[]", ["seeds (=[])", "at least 1"]),
    "a seed twice": ("seeds=[1, 1]", ["seeds (=[1, 1])", "differ"]),
    "unknown recipe": ("rows.control.use=[cycle]", ["rows.control.use", "'cycle'", "cycles"]),
    "unknown teacher": ("rows.control.teacher=foo", ["rows.control.teacher", "'foo'", "plain"]),
    "unknown control": ("control=foo", ["control", "'foo'", "plain"]),
    "a teacher without distillation": ("rows.control.teacher=repvgg", ["distill and teacher"]),
    "an unknown policy": ("cell.policy=best", ["policy (='best')", "raug15"]),
    "two crops": ("cell.resized_crop=8", ["crop_padding (=1)", "resized_crop (=8)"]),
    "half an interval": ("cell.crop_area=[0.5]", ["cell.crop_area (=[0.5])", "2 items"]),
    "an interval upside down": ("cell.crop_area=[1, 0.5]", ["crop_area", "least, most"]),
    "too much smoothing": ("cell.label_smoothing=2", ["cell.label_smoothing (=2)"]),
    "no width": ("cell.width=0", ["cell.width (=0)", "greater than 0"]),
    "the width of a body that has one": ("cell.width=2", ["width (=2.0)", "digits are fixed"]),
    "an option that the family lacks": (
        "rows.plain.set={block_options: {foo: 1}}",
        ["row plain", "block_options", "no option 'foo'", "norms"],
    ),
    "options of a fixed body": (
        "rows.plain.set={body: cifar_resnet56, block_options: {norms: sum}}",
        ["block_options", "layers of cifar_resnet56 are fixed"],
    ),
    "an option of another type": (
        "rows.plain.set={block_options: {without: 3}}",
        ["block=convbn", "block_options (={'without': 3})"],
    ),
    "an option that is a mapping": (
        "rows.plain.set={block_options: {norms: {a: 1}}}",
        ["block_options.norms (={'a': 1})", "finite number"],
    ),
    "an infinite option": (
        "rows.plain.set={block_options: {norms: [.inf]}}",
        ["block_options.norms (=[inf])", "finite number"],
    ),
    "the options of another row's network": (
        "rows.repvgg.set={block_options: {without: [1x1]}}",
        ["block_options (=None)", "starts from", "repvgg (={'without': ['1x1']})"],
    ),
    "an option that the body lacks": (
        "rows.plain.set={body: cifar_repmlpnet, body_options: {foo: 1}}",
        ["row plain", "body_options", "no option 'foo'", "sizes"],
    ),
    "an option of the body of another type": (
        "rows.plain.set={body: cifar_repmlpnet, body_options: {window: wide}}",
        ["body=cifar_repmlpnet", "body_options (={'window': 'wide'})"],
    ),
    "an option of the body that is a mapping": (
        "rows.plain.set={body: cifar_repmlpnet, body_options: {sizes: {a: 1}}}",
        ["body_options.sizes (={'a': 1})", "finite number"],
    ),
    "the body's options of another row's network": (
        "rows.repvgg.set={body: cifar_repmlpnet, body_options: {window: 16}}",
        ["must be that of the row", "starts from"],
    ),
    "a field of few pixels": ("cell.receptive_field=4", ["cell.receptive_field (=4)", "8"]),
    "an unknown key of a counted network": (
        "networks.a={label: A, body: resmlp12, image_size: 32, block_option: {}}",
        ["networks.a.block_option", "perhaps block_options is meant"],
    ),
    "a counted network that cannot be": (
        "networks.a={label: A, body: resmlp12, image_size: 32, body_options: {windows: 8}}",
        ["networks.a", "no option 'windows'", "window"],
    ),
    "an unknown view": ("cell.views=[mirrored]", ["cell.views.0 (='mirrored')", "rotated_90"]),
    "a typed number": (
        "rows.plain.paper_accuracy=70",
        ["paper_accuracy (=70)", "no such key", "paper"],
    ),
    "an unknown quantity": (
        "rows.plain.paper={row: repan/cifar_main/x, accuracies: y}",
        ["rows.plain.paper.accuracies", "perhaps accuracy is meant"],
    ),
    "a size of CIFAR": ("cell={data: cifar10, image_size: 16}", ["image_size", "or digits only"]),
    "a block that is not there": (
        "recipes.cycles.cycle.blocks=[stem]",
        ["blocks (='stem')", "stages.0.0.block"],
    ),
    "no variant": ("variants={}", ["variants", "at least 1"]),
    "a variant without a name": ("variants={a: {}}", ["variants.a.label", "required"]),
    "an unknown key of a variant": (
        "variants={a: {label: A, body: digits}}",
        ["variants.a.body (='digits')", "no such key", "recipes"],
    ),
    "an unknown key of a variant's cell": (
        "variants={a: {label: A, cell: {bodi: digits}}}",
        ["recipes.a.bodi (='digits')", "perhaps body is meant"],
    ),
    "a variant without its control": (
        "variants={a: {label: A, rows: {control: null}}}",
        ["rows.a_plain_long.as_long_as", "no row 'control'"],
    ),
    "an unknown precision": ("cell.precision=float16", ["cell.precision", "bfloat16"]),
    "its own parent": ("rows.control.start=control", ["control -> control", "circle"]),
    "a circle": ("rows.repvgg.start=control", ["repvgg -> control -> repvgg", "circle"]),
    "a circle of lengths": ("rows.repvgg.as_long_as=repvgg_long", ["circle"]),
    "a seed inside a cell": ("cell.seed=1", ["cell.seed (=1)", "seeds"]),
    "a parent inside a cell": ("cell.start=abc", ["cell.start (='abc')", "row's own start"]),
    "a teacher inside a row's set": ("rows.plain.set.teacher=abc", ["rows.plain.set.teacher"]),
    "no sign": ("cell.flip", ["cell.flip", "key=value"]),
    "no key": ("=1", ["key=value"]),
    "no identifier": ("cell.a b=1", ["cell.a b", "plain names"]),
    "a newline in the key": ("cell.a\nimport os=1", ["cell.a\\nimport os", "plain names"]),
    "a newline in a nested key": ('cell={"a\\nb": 1}', ["cell.a\\nb", "no such key"]),
    "a newline in a recipe": ('recipes={"a\\nb": {}}', ["recipes.a\\nb", "one plain word"]),
    "a newline in a row": ('rows={"a\\nb": {label: x}}', ["rows.a\\nb", "one plain word"]),
    "an escape sequence": ('cell.body="\\e[2J"', ["\\x1b[2J"]),
    "a key that is a number": ("cell={1: 2}", ["cell", "string"]),
    "half a character": ('title="\\ud800"', ["not readable as YAML"]),
    "a tag": ("seeds=!!python/object/apply:os.system [true]", ["python/object/apply", "tag"]),
    "a harmless tag": ("seeds=!!int ''", ["tag"]),
    "an alias": ("seeds=[&a 1, *a]", ["anchors and aliases"]),
    "no YAML": ("seeds=[", ["not readable as YAML"]),
    "deep": ("seeds=" + "[" * 2000, ["not readable as YAML"]),
    "extends": ("extends=smoke.yaml", ["extends", "no such key"]),
}


def refusal(path: Path, changes: list[str]) -> str:
    """The one line with which a table is refused."""
    with pytest.raises(UserError) as caught:
        load_table(path, changes)
    line = str(caught.value)
    assert line and line.isprintable(), "more than one line"
    return line


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_profile_loads(path):
    assert isinstance(load_table(path, networks=False), Table)


@pytest.mark.slow
@pytest.mark.parametrize("path", PROFILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_network_of_a_profile_exists(path):
    assert isinstance(load_table(path), Table)


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting(case):
    setting, named = BAD_SETTINGS[case]
    line = refusal(QUICK, [setting])
    for text in ("--set", *named):
        assert text in line, line


def test_a_key_set_twice():
    line = refusal(QUICK, ["seeds=[1]", " seeds =[2]"])
    assert "--set  seeds =[2]" in line and "set twice" in line


def test_settings_change_what_they_name_and_nothing_else():
    before = load_table(QUICK).model_dump()
    after = load_table(QUICK, ["recipes.cycles.cycle.warmup=3", "seeds=[5, 7]"]).model_dump()
    assert after["seeds"] == [5, 7] and after["recipes"]["cycles"]["cycle"].pop("warmup") == 3
    assert before["recipes"]["cycles"]["cycle"].pop("warmup") == 4
    assert after | {"seeds": before["seeds"]} == before


# -- whole files ---------------------------------------------------------------------------------
GOOD = """
title: t
question: q
control: a
seeds: [0]
cell: {data: digits, train_images: 40, held_out: 10, body: digits, learning_rate: 0.1, epochs: 1}
rows: {a: {label: A}, b: {label: B, start: a}}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_FILES = {
    "empty": (b"", ["mapping"]),
    "a list": (b"- 1\n", ["mapping"]),
    "a number": (b"1e-4", ["mapping"]),
    "two documents": (b"a: 1\n---\nb: 2\n", ["YAML", "single document"]),
    "not UTF-8": (b"title: \xff\xfe\n", ["text", "utf-8"]),
    "a control character": (b"title: \x00\n", ["YAML", "not allowed"]),
    "a key that is a number": (b"1: 2\n", ["key"]),
    "a key that is a list": (b"? [a]\n: 2\n", ["YAML", "unhashable"]),
    "a key twice": (GOOD.encode() + b"title: again\n", ["'title' stands twice", "line 8"]),
    "a nested key twice": (b"rows:\n  a: {label: A, label: B}\n", ["'label' stands twice"]),
    "a bomb": (BOMB.encode(), ["anchors and aliases", "line 1"]),
    "itself": (b"a: &a [*a]\n", ["anchors and aliases"]),
    "a merge key": (b"a: {<<: {b: 1}}\n", ["YAML"]),
    "extends itself": (b"extends: bad.yaml\n", ["extends itself"]),
    "extends a circle": (b"extends: back.yaml\n", ["extends itself"]),
    "extends nothing": (b"extends: ''\n", ["extends (='')"]),
    "extends upwards": (b"extends: ../quick.yaml\n", ["extends (='../quick.yaml')", "folder"]),
    "extends the folder above": (b"extends: ..\n", ["extends (='..')"]),
    "extends absolutely": (b"extends: /etc/passwd\n", ["extends (='/etc/passwd')"]),
    "extends a zero byte": (b'extends: "a\\0"\n', ["extends (='a\\x00')"]),
    "extends what is not there": (b"extends: absent.yaml\n", ["absent.yaml", "cannot be read"]),
    "extends a list": (b"extends: [a]\n", ["extends (=['a'])"]),
    "half a table": (b"title: t\n", ["question", "required"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, tmp_path):
    content, named = BAD_FILES[case]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    (tmp_path / "back.yaml").write_text("extends: bad.yaml\n")
    line = refusal(path, [])
    for text in ("yaml", *named):
        assert text in line, line


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/name:os.mkdir {}"]
)
def test_no_tag_is_executed(tag, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"title: {tag.format(tmp_path / 'made')}\n")
    assert "tag" in refusal(path, [])
    assert not (tmp_path / "made").exists()


def test_variants_repeat_the_rows_on_other_networks():
    settings = [
        "variants.one={label: One, cell: {block: acb, learning_rate: 9}}",  # recipes state another
        "variants.two={label: Two, recipes: {cycles: {phases: 2}}, rows: {redraw: null, "
        "repvgg: {label: other}, plain: {set: {body: digits_wide}}}}",
        "variants.three=",
    ]
    table, plain = load_table(QUICK, settings), load_table(QUICK)
    assert table.controls == {"One": "one_control", "Two": "two_control"}
    assert table.control == "one_control"
    assert len(table.rows) == 2 * len(plain.rows) - 1 and "two_redraw" not in table.rows
    for row in plain.rows:
        expected = plain.cell_of(row, 3)
        own = {} if "block" in plain.rows[row].set else {"block": "acb"}
        assert table.cell_of(f"one_{row}", 3) == expected | own
        spec, before = table.rows[f"one_{row}"], plain.rows[row]
        assert (spec.variant, spec.label) == ("One", f"One: {before.label}")
        for relation in ("start", "teacher", "against", "as_long_as"):
            other = getattr(before, relation)
            assert getattr(spec, relation) == (other and f"one_{other}")
    assert table.rows["two_repvgg"].label == "Two: other"
    assert table.cell_of("two_plain", 0)["body"] == "digits_wide"
    assert table.cell_of("two_control", 0)["phases"] == 2
    assert table.cell_of("one_control", 0)["phases"] == plain.cell_of("control", 0)["phases"]


def test_a_missing_file():
    assert "cannot be read" in refusal(ROOT / "params" / "table2" / "absent.yaml", [])


def test_a_profile_states_only_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    (tmp_path / "more.yaml").write_text("extends: base.yaml\ncell: {epochs: 2}\nrows: {b: null}\n")
    table = load_table(tmp_path / "more.yaml")
    assert list(table.rows) == ["a"]
    assert table.cell == load_table(tmp_path / "base.yaml").cell | {"epochs": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("7", 7),
        ("2001-01-01", "2001-01-01"),
        ("1e", "1e"),
        ("e1", "e1"),
        ("0.0.1", "0.0.1"),
        ("null", None),
        ("true", True),
        ("", None),
        ("-.inf", -math.inf),
    ],
)
def test_scalars(text, value):
    read = parse_yaml(text, "here")
    assert (type(read), read) == (type(value), value)


# -- anything at all -----------------------------------------------------------------------------
YAML_LIKE = st.text(
    st.sampled_from("ab01.:-[]{},&*!#|>?'\"% \n\t\\~=<e_x\u00e9\ud7ff"), max_size=60
)
KEYS = [*Table.model_fields, "recipes.base.epochs", "rows.control.start", "cell.cycle", "cell.body"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loads_or_refuses(path: Path, changes: list[str]) -> None:
    try:
        load_table(path, changes)
    except UserError as error:
        assert str(error).isprintable()


@many
@given(st.binary(max_size=60) | YAML_LIKE.map(str.encode))
@example(b"1" + b":59" * 3000)
def test_any_file(tmp_path, content):
    (tmp_path / "any.yaml").write_bytes(content)
    loads_or_refuses(tmp_path / "any.yaml", [])


@many
@given(st.sampled_from(KEYS), YAML_LIKE | VALUES.map(lambda v: yaml.safe_dump(v, width=1000)))
@example("seeds", "[1" + ":59" * 3000 + "]")
@example("extends", "''")
def test_any_setting(key, text):
    loads_or_refuses(QUICK, [f"{key}={text}"])


@many
@given(st.text(max_size=30))
def test_any_text_as_setting(text):
    loads_or_refuses(QUICK, [text])


@given(VALUES.filter(lambda v: isinstance(v, dict)), VALUES.filter(lambda v: isinstance(v, dict)))
@settings(max_examples=50, suppress_health_check=[HealthCheck.filter_too_much])
def test_merging_keeps_both_sides(base, changes):
    both = merged(base, changes)
    assert both.keys() == base.keys() | changes.keys()
    assert merged(both, changes).keys() == both.keys()


def test_applying_nothing_changes_nothing():
    assert apply_settings({"a": {"b": 1}}, []) == {"a": {"b": 1}}
