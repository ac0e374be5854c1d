"""The command line: `python -m replib COMMAND`; `make help` shows the same as targets."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from replib.errors import UserError

COMPILE = ("none", "auto", "default", "cudagraphs", "recorded")
COMPILE_HELP = (
    "the training step (default: auto): none; default: by torch.compile; cudagraphs: and recorded "
    "as one CUDA graph; recorded: that alone; auto: where the run is long enough to repay it"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help).")


def parser() -> argparse.ArgumentParser:
    """Commands and their arguments."""
    out = Parser(prog="replib", description=__doc__)
    commands = out.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def table_command(
        name: str,
        text: str,
        count: str | None = None,
        named: str = "an id such as table2: a folder of params/",
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("table", nargs=count, help=named)
        command.add_argument("--profile", default="quick", help="a file of that folder")
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a parameter"
        )
        return command

    named = "an id such as table2: a folder of params/; or a file of your own: FILE.yaml"
    text = "train the missing cells of a table; no notebook is needed"
    run = table_command("run", text, "?", named)
    blocks_option(run)
    run.add_argument("--queue", type=Path, help="in place of a table: a file of many, in order")
    run.add_argument("--list", action="store_true", help="how far the queue is; trains nothing")
    again = table_command("reproduce", "leave the report of a table or notebook; train for it")
    again.add_argument("more", nargs="*", help="further ids: the cells of all are trained together")
    for command in (run, again):
        command.add_argument("--workers", type=int, help="worker processes (default: all cores)")
        command.add_argument("--budget-seconds", type=float, help="stop and checkpoint after")
        command.add_argument("--compile", choices=COMPILE, help=COMPILE_HELP)
        text = "where cells are trained: local, on this machine (default), or slurm, as jobs of it"
        command.add_argument("--executor", choices=("local", "slurm"), help=text)
        text = "of --executor slurm: partition, time (minutes), gpus, cpus, cells (per job), "
        text += "parallel (jobs of an array at once), ..."
        command.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help=text)
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument(
        "--checkpoint-seconds", type=float, default=15, help="at most so much is done twice"
    )
    run.add_argument("--out", type=Path, help="also write the evidence of this table to one file")
    weights = table_command(
        "weights", "write the trained networks of a table as files; train what is missing"
    )
    weights.add_argument("--out", type=Path, help="a folder (default: weights/TABLE-PROFILE)")
    weights.add_argument("--workers", type=int, help="worker processes (default: all cores)")
    repeat = table_command(
        "repeat",
        "train cells that have evidence a second time, from nothing, and compare; status 1 where "
        "results differ though the machine does not",
    )
    repeat.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="(all)")
    repeat.add_argument("--seeds", nargs="+", default=[], type=int, metavar="SEED", help="(all)")
    repeat.add_argument("--workers", type=int, help="worker processes (default: all cores)")
    repeat.add_argument("--budget-seconds", type=float, help="stop and checkpoint after")
    repeat.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    text = "train again what was trained again before, too"
    repeat.add_argument("--fresh", action="store_true", help=text)
    table_command("publish", "copy this machine's evidence of a table to reports/evidence")
    figure = table_command("figure", "draw the gains from the published evidence as a PNG")
    figure.add_argument("--out", type=Path, required=True, help="the file to write")
    commands.add_parser(
        "list", help="every table and figure of the papers: status, command; profiles"
    )
    commands.add_parser("proofs", help="render the proofs and explanations; trains no table")
    text = "render every page that has evidence; trains nothing"
    pages = commands.add_parser("reports", help=text, description=text)
    pages.add_argument("--only", choices=("index",), help="index, methods, findings, checklist")
    bench_command(commands)
    evidence = commands.add_parser("evidence", help="check evidence files and take them in")
    evidence.add_argument("action", choices=("add", "check"))
    evidence.add_argument("files", nargs="*", type=Path, help="add: bundles; check: default all")
    network_commands(commands)
    return out


def blocks_option(command: argparse.ArgumentParser) -> None:
    """A file of one's own; it is run, so that only its user can name it, here."""
    command.add_argument(
        "--blocks",
        action="append",
        default=[],
        type=Path,
        metavar="FILE.py",
        help="your own Python file, which is run, and registers further families of blocks",
    )


def bench_command(commands) -> None:
    """bench: speed and memory, side by side; latency: of networks after training."""
    text = "measure speed and memory as ratios, side by side; killed, the same command goes on"
    bench = commands.add_parser("bench", help=text, description=text)
    bench.add_argument("--cases", nargs="+", metavar="CASE", help="all; NAME/ is all below it")
    bench.add_argument("--profile", action="store_true", help="where the time of a target goes")
    text = (
        "measure one image and many in every form after training: with branches, fused, compiled, "
        "in ONNX Runtime; killed, the same command goes on"
    )
    latency = commands.add_parser("latency", help=text, description=text)
    latency.set_defaults(cases=["latency/"], profile=False)
    for command in (bench, latency):
        measuring_options(command)


def measuring_options(bench: argparse.ArgumentParser) -> None:
    """What both have in common."""
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    bench.add_argument("--quick", action="store_true", help="tiny networks: does it run at all")
    bench.add_argument("--list", action="store_true", help="the cases, and what they take")
    bench.add_argument("--budget-seconds", type=float, help="begin nothing that takes longer")
    bench.add_argument("--threads", type=int, help="of a processor (all cores)")
    bench.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    bench.add_argument("--verbose", action="store_true", help="show what a failing case says")
    bench.add_argument(
        "--out", type=Path, help="the JSON file (reports/measurements/COMMAND-PROCESSOR.json)"
    )


def network_commands(commands) -> None:
    """train, test, deploy and export: one network."""

    def command(name: str, text: str, needs_data: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument(
            "--data",
            required=needs_data,
            metavar="D",
            help="digits, cifar10, cifar100, or the path of an image folder: train/CLASS/*, and "
            "val/CLASS/* or test/CLASS/*; classes are numbered by their sorted names",
        )
        made.add_argument("--data-dir", metavar="FOLDER", help="where cifar10/100 lie (data/)")
        made.add_argument("--image-size", type=int, help="of an image folder (as they are)")
        text = "shorter side before the centre crop to --image-size (no more than that is cut)"
        made.add_argument("--image-resize", type=int, help=text)
        return made

    train = command(
        "train",
        "train one network: a cell of a table, so it can be killed and goes on by the same command",
    )
    train.add_argument(
        "--body", required=True, help="cifar_repvgg_a1, resnet18, ...; an unknown name lists all"
    )
    train.add_argument("--block", help="repvgg; dbb, acb, ...; an unknown name lists all")
    for name, kind, text in (
        ("epochs", int, "20; of each of --set phases=N"),
        ("batch-size", int, "128"),
        ("learning-rate", float, "0.1, cosine to 0"),
        ("momentum", float, "0.9"),
        ("weight-decay", float, "0.0001"),
        ("train-images", int, "all; drawn anew for every seed"),
        ("held-out", int, "a tenth; of these, images that select the epoch"),
    ):
        train.add_argument(f"--{name}", type=kind, help=text)
    train.add_argument(
        "--protocol", choices=("clean", "paper"), help="clean; paper: the test split selects"
    )
    train.add_argument("--compile", choices=COMPILE, help=COMPILE_HELP)
    train.add_argument("--start", metavar="CKPT", help="a file, or the key of a trained cell")
    train.add_argument("--seed", type=int, default=0, help="0; of weights, order and split")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of a cell, as in params/*.yaml; crops are padded by 4 pixels and images "
        "flipped if nothing else is said (digits: 1, not flipped)",
    )
    train.add_argument("--out", required=True, type=Path, help="the network: F.safetensors")

    test = command("test", "accuracy of a network on the test split")
    test.add_argument(
        "--form", choices=("training", "deployed", "both"), help="default: all that there is"
    )
    deploy = command(
        "deploy",
        "merge a network's blocks, compare accuracy and outputs before and after on real images, "
        "and write it; status 1, and nothing written, where they differ by more than rounding",
    )
    export = command(
        "export",
        "fuse a network, verify it, write it as ONNX or as a torch.export program, run that and "
        "compare; status 1, and nothing written, where it differs by more than rounding",
        needs_data=False,
    )
    for tool in (test, deploy, export):
        tool.add_argument("network", metavar="CKPT", type=Path, help="from train, or released")
        tool.add_argument("--arch", help="which network a released file is: repvgg_a0, ...")
    for tool in (train, test, deploy, export):
        blocks_option(tool)
    for tool in (train, test, deploy):
        tool.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is")
    for tool in (test, deploy):
        tool.add_argument("--batch-size", type=int, default=256, help="images at once (256)")
    export.add_argument(
        "--shape", metavar="C,H,W", help="of an image, in place of --data: it is tried on noise"
    )
    export.add_argument(
        "--form", choices=("deployed", "training"), default="deployed", help="default: deployed"
    )
    export.add_argument("--opset", type=int, help="of ONNX (18)")
    export.add_argument(
        "--out", required=True, type=Path, help="F.onnx (ONNX) or F.pt2 (torch.export)"
    )
    deploy.add_argument(
        "--out",
        required=True,
        type=Path,
        help="F.safetensors (for replib, and any reader of the format), F.pt2 (a torch.export "
        "program that needs no replib), F.onnx, or any name for --layout official",
    )
    deploy.add_argument(
        "--layout",
        choices=("replib", "official"),
        default="replib",
        help="official: what the deployed script of --arch's own repository loads",
    )


def run(arguments: argparse.Namespace) -> None:
    from replib import parallel
    from replib.experiments.executor import NotTrained, run_plan
    from replib.experiments.store import Store

    budget = positive("--budget-seconds", arguments.budget_seconds)
    plan, store, title, state = wanted(arguments, Store())
    if arguments.list:
        print("\n".join(state()))
        return
    if budget is not None:  # of the whole command: reading and planning count
        budget -= time.monotonic() - arguments.started
    try:
        done = run_plan(
            plan,
            store,
            title=title,
            workers=positive("--workers", arguments.workers),
            budget_seconds=budget,
            checkpoint_seconds=positive("--checkpoint-seconds", arguments.checkpoint_seconds),
            device=arguments.device,
            compile=arguments.compile or "auto",
            executor=arguments.executor or "local",
            slurm=arguments.slurm,
        )
        print(f"{done.trained} cells trained, {done.present} were there.")
    except NotTrained:  # the others are taken home all the same
        if arguments.out:
            write_bundle(arguments.out, plan, store)
        raise
    if arguments.out:
        parallel.wait()  # for what the first of several processes still writes
        if parallel.place() == 0:
            write_bundle(arguments.out, plan, store)
        parallel.wait()
    if done.out_of_time:
        print(f"{done.out_of_time} cells not finished in the time given; run again to go on.")
    for line in state():
        print(line)


def wanted(arguments: argparse.Namespace, store) -> tuple:
    """(plan, store, title, what is said at the end: a function) of what is to be trained."""
    from replib.experiments import queue
    from replib.report.results import Results

    if arguments.queue:
        if arguments.table or arguments.set:
            raise UserError(
                f"--queue (={arguments.queue}) names its tables and settings itself: leave "
                f"{arguments.table or '--set'} out."
            )
        planning = queue.Planning(queue.read(arguments.queue), store)
        return planning.plan, store, f"{arguments.queue.name}:", planning.state
    if not arguments.table or arguments.list:
        missing = "--list is of a queue" if arguments.table else "no table is named"
        raise UserError(f"run: {missing}: say run TABLE, or run --queue FILE.")
    results = Results(arguments.table, arguments.profile, arguments.set)

    def measured() -> list[str]:
        there = results.measure(arguments.device) is not None
        lines = ["The trained networks are measured."] if there else []
        return lines + (accuracies(results) if arguments.table.endswith(".yaml") else [])

    return results.plan, store, f"{results.id} {results.profile}:", measured


def accuracies(results) -> list[str]:
    """The rows of a table that has no page: deployed test accuracy, and the gain by seeds."""
    results.__dict__.pop("own", None)  # what was read before the training
    lines = ["accuracy of the deployed networks on test images, in percent; 95 % intervals"]
    width = max(map(len, results.rows))
    for row in results.rows:
        found, gain = results.accuracy(row), results.gain(row)
        text = "not finished" if found is None else spoken(found)
        over = f"; over {results.against(row)}, in points: {spoken(gain)}" if gain else ""
        lines.append(f"  {row:<{width}}  {text}{over}")
    return lines


def spoken(found) -> str:
    """An estimate over seeds, as text."""
    interval = f" ({found.low:.2f} to {found.high:.2f})" if found.n > 1 else ""
    return f"{found.mean:.2f}{interval}, seeds: {found.n}"


def write_bundle(out: Path, plan, store) -> None:
    """The evidence of a plan as one file, and beside it what is to go on from."""
    from replib.experiments import queue
    from replib.experiments.store import compact
    from replib.training.checkpoint import write_bytes

    own = [found for key in plan.cells if (found := store.read(key)) is not None]
    write_bytes(out, compact({"evidence": own}))
    print(f"{len(own)} evidence files in {out}")
    for path in queue.save_states(plan, store, out):
        print(f"{path}, {path.stat().st_size / 2**20:.1f} MiB, to go on from")


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Those of --set, and `make`'s SET."""
    return arguments.set + from_make("REPLIB_SET")


def reproduce(arguments: argparse.Namespace) -> None:
    from replib.report.render import reproduce, reproduce_all

    workers = positive("--workers", arguments.workers)
    budget = positive("--budget-seconds", arguments.budget_seconds)
    settings = settings_of(arguments)
    slurm = arguments.slurm + from_make("REPLIB_SLURM")
    executor = arguments.executor or os.environ.get("REPLIB_EXECUTOR") or "local"
    for name, value in (
        ("REPLIB_WORKERS", workers),
        ("REPLIB_BUDGET_SECONDS", budget),
        ("REPLIB_COMPILE", arguments.compile),
        ("REPLIB_EXECUTOR", executor),
        ("REPLIB_SLURM", " ".join(slurm)),
    ):
        if value is not None:
            os.environ[name] = str(value)
    if arguments.more:
        names = list(dict.fromkeys([arguments.table, *arguments.more]))
        options = {"workers": workers, "budget_seconds": budget}
        options["compile"] = arguments.compile or "auto"
        if executor != "local" or slurm:
            options |= {"executor": executor, "slurm": slurm}
        for page in reproduce_all(names, arguments.profile, settings, **options):
            print(f"The report: {page}")
        return
    page = reproduce(arguments.table, arguments.profile, settings)
    print(f"The report: {page}")


def from_make(name: str) -> list[str]:
    """What `make` hands over as one text: key=value after key=value, values may hold spaces."""
    from replib.experiments.params import in_parts

    return in_parts(os.environ.get(name, ""))


def weights(arguments: argparse.Namespace) -> None:
    from replib.experiments import model_files
    from replib.experiments.store import home
    from replib.report.results import Results

    workers = positive("--workers", arguments.workers)
    results = Results(arguments.table, arguments.profile, settings_of(arguments))
    results.plan.weights.update(results.plan.by_row.values())
    results.train(workers=workers)
    folder = arguments.out or home() / "weights" / f"{results.id}-{results.profile}"
    found = model_files.write_networks(results.plan, results.store, folder)
    print(f"{found.total()} networks in {folder}; SHA256SUMS and models.json say what they are.")
    for standing, count in sorted(found.items()):
        print(f"  {count} {model_files.SAID[standing]}")


def repeat(arguments: argparse.Namespace) -> int:
    from replib.experiments import repeat as repeated
    from replib.experiments.executor import device_here, run_plan
    from replib.report.results import Results

    device, workers = device_here(arguments.device), positive("--workers", arguments.workers)
    budget = positive("--budget-seconds", arguments.budget_seconds)
    results = Results(arguments.table, arguments.profile, settings_of(arguments))
    plan, store, again = results.plan, results.store, repeated.second_store(device)
    keys = repeated.chosen(plan, arguments.rows, arguments.seeds, store)
    title = f"{results.id} {results.profile}, again:"
    if why := repeated.begun(again, device, arguments.fresh):
        print(f"What was trained a second time before is not used ({why}).")
    options = {"title": title, "device": device, "workers": workers, "budget_seconds": budget}
    done = run_plan(plan.of(keys), again, **options)
    print(f"{done.trained} cells trained again, {done.present} were: in {again.runs}")
    cells = repeated.comparison(plan, keys, store, again)
    if len(cells) < len(keys):
        print(f"{len(keys) - len(cells)} of {len(keys)} cells not finished; run again to go on.")
    if not cells:
        return 0
    path = repeated.path_of(store, results.id, results.profile, device)
    repeated.write(path, device, cells)
    print("\n".join(repeated.sentences(cells)))
    print(path)
    if broken := repeated.broken(cells):
        print(f"replib: {repeated.complaint(broken[0])}", file=sys.stderr)
    return 1 if broken else 0


def publish(arguments: argparse.Namespace) -> None:
    from replib.experiments import measurements
    from replib.report.results import Results

    results = Results(arguments.table, arguments.profile, arguments.set)
    hashes = {key: evidence["result_sha256"] for key, evidence in results.own.items()}
    before = {key: evidence["result_sha256"] for key, evidence in results.published.items()}
    other = sum(key in before and before[key] != own for key, own in hashes.items())
    for key in hashes:
        results.store.publish(key)
    if measured := measurements.publish(results.store, arguments.table, arguments.profile):
        print(measured)
    missing = len(results.plan.cells) - len(results.own)
    left = f"; {missing} cells have none on this machine" if missing else ""
    print(f"{len(results.own)} evidence files in {results.store.published}{left}.")
    if other:
        print(f"{other} of them replaced a different result: see git diff.")


def figure(arguments: argparse.Namespace) -> None:
    import io

    from replib.report.figures import gains
    from replib.report.results import Results
    from replib.report.standing import Evidence, Recorded
    from replib.training.checkpoint import write_bytes

    if arguments.set:
        results = Results(arguments.table, arguments.profile, arguments.set)
    else:  # nothing that published evidence does not say: data need not be here
        results = Recorded(arguments.table, arguments.profile, Evidence())
    drawn = gains(results, published=True)
    if drawn is None:
        raise UserError(f"{arguments.table} {arguments.profile} has no published evidence.")
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_bytes(arguments.out, content.getvalue())
    print(arguments.out)


def list_tables(arguments: argparse.Namespace) -> None:
    from textwrap import shorten

    from replib.report.catalogue import catalogue, uncatalogued
    from replib.report.notebooks import notebooks
    from replib.report.standing import Standings, catalogue_counts

    standings = Standings()
    found = standings.all()
    for name, work in catalogue().items():
        print(". ".join(filter(None, (work.title, work.venue))))
        for key, item in work.items.items():
            shown, said = shorten(item.title, 64, placeholder="…"), found[f"{name}/{key}"].said
            command = "; ".join(item.commands)
            print(f"  {name + '/' + key:<32} {shown:<64} {said:<44} {command}".rstrip())
    counts = catalogue_counts(found)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{sum(counts.values())} tables and figures of papers: {said}")
    print("Profiles of the tables: make reproduce-TABLE PROFILE=PROFILE")
    for table, names in standings.profiles.items():
        print(f"  {table:<32} {', '.join(names)}")
    if others := uncatalogued((*standings.profiles, *notebooks())):
        print("In no paper's catalogue")
        for name in others:
            print(f"  {name:<32} make reproduce-{name}")
    for profile, error in standings.refused.items():
        print(f"{profile}: {error}")


def proofs(arguments: argparse.Namespace) -> None:
    from replib.report import notebooks, render

    for name in notebooks.proofs():
        print(render.reproduce(name, "quick", []))


def reports(arguments: argparse.Namespace) -> None:
    from replib.report.render import index, render_all

    if not arguments.only:
        for line in render_all():
            print(line, flush=True)
    print(index())


def evidence(arguments: argparse.Namespace) -> None:
    from replib.experiments import queue
    from replib.experiments.evidence import key_problem, problem
    from replib.experiments.store import Store, read_evidence, sha256
    from replib.foreign import json_of

    store = Store()
    if arguments.action == "check":
        files = arguments.files or sorted(store.published.glob("*.json"))
        bad = [
            str(f)
            for f in files
            if (e := read_evidence(f)) is None or not_named(f, e) or problem(e)
        ]
        if bad:
            raise UserError(f"{len(bad)} of {len(files)} evidence files are damaged: {bad[0]}")
        print(f"{len(files)} evidence files are whole.")
        return
    if not arguments.files:
        raise UserError("evidence add: name at least one file that `run --out` wrote.")
    for path in arguments.files:
        try:
            found = json_of(path)["evidence"]
            right = all(e["result_sha256"] == sha256(e["result"]) for e in found)
            keys = [str(e["result"]["key"]) for e in found if "context" in e]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{path} is no bundle of evidence ({said}).") from None
        if not right or len(keys) < len(found):
            raise UserError(f"{path}: a result does not match its hash; nothing was taken.")
        for key in keys:
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise UserError(f"{path}: key (={key!r}) is not one of a cell; nothing was taken.")
        if problems := [said for one in found if (said := key_problem(one))]:
            raise UserError(f"{path}: evidence of no cell ({problems[0]}); nothing was taken.")
        try:
            queue.take_evidence(found, store)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        states, left = queue.take_states(path, store)
        also = f"; {states} files to go on from are in {store.runs}" if states else ""
        print(f"{len(found)} evidence files from {path} are in {store.published}{also}.")
        for line in left:
            print(line)


def bench(arguments: argparse.Namespace) -> int:
    import torch

    from replib.benchmark import running
    from replib.experiments.store import home

    device = arguments.device
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"device (={device!r}) is not on this machine: say cpu.")
    folder = home() / "reports" / ("runs" if arguments.quick else "measurements")
    shared = Path(os.environ.get("REPLIB_SHARED", home().parent / "shared"))
    return running.main(
        device,
        arguments.out or folder / running.file_name(device, arguments.command),
        quick=arguments.quick,
        show=arguments.list,
        cases=arguments.cases,
        budget_seconds=positive("--budget-seconds", arguments.budget_seconds),
        threads=positive("--threads", arguments.threads),
        profile=arguments.profile,
        fresh=arguments.fresh,
        verbose=arguments.verbose,
        vectors=shared / "vectors",
    )


def train(arguments: argparse.Namespace) -> None:
    from replib.experiments.params import Cell
    from replib.tools import named_data, train

    given = {k: v for k, v in vars(arguments).items() if k in Cell.model_fields and v is not None}
    given |= named_data(arguments.data, arguments.data_dir)
    options = {"device": arguments.device, "compile": arguments.compile or "auto"}
    train(given, arguments.set, arguments.out, **options)


def test(arguments: argparse.Namespace) -> None:
    from replib.tools import test

    test(arguments.network, form=arguments.form, **tool_options(arguments))


def deploy(arguments: argparse.Namespace) -> int:
    from replib.tools import deploy

    options = tool_options(arguments) | {"layout": arguments.layout}
    return 0 if deploy(arguments.network, out=arguments.out, **options) else 1


def export(arguments: argparse.Namespace) -> int:
    from replib.tools import export_file, open_data

    if (arguments.data is None) == (arguments.shape is None):
        raise UserError(
            "export: say --data D, or the shape of an image, such as --shape 3,224,224."
        )
    options: dict = {"arch": arguments.arch, "form": arguments.form}
    if arguments.opset is not None:
        options["opset"] = int(positive("--opset", arguments.opset))
    arguments.network.open("rb").close()  # a missing file is told before data are read
    if arguments.shape is None:
        sizes = arguments.image_size, arguments.image_resize
        options["data"] = open_data(arguments.data, arguments.data_dir, *sizes)
    else:
        sizes = arguments.shape.split(",")
        if not all(size.isdecimal() and int(size) for size in sizes):
            raise UserError(f"--shape (={arguments.shape!r}) must be numbers such as 3,224,224.")
        options["shape"] = tuple(map(int, sizes))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"replib: {message}", file=sys.stderr)
        report = export_file(arguments.network, arguments.out, **options)
    return 0 if report.ok else 1


def tool_options(arguments: argparse.Namespace) -> dict:
    """What test and deploy have in common."""
    from replib.tools import open_data

    batch = positive("--batch-size", arguments.batch_size)
    arguments.network.open("rb").close()  # a missing file is told before data are read
    sizes = arguments.image_size, arguments.image_resize
    data = open_data(arguments.data, arguments.data_dir, *sizes)
    return {"data": data, "arch": arguments.arch, "device": arguments.device, "batch": batch}


def not_named(path: Path, found: dict) -> bool:
    """Whether a published file does not carry its own key as its name."""
    return path.parent.name == "evidence" and not found["result"]["key"].startswith(path.stem)


def positive(name: str, value: float | None) -> float | None:
    """Refuse a number that is not above 0."""
    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"{name} (={value}) must be a number above 0.")
    return value


COMMANDS = {
    "run": run,
    "reproduce": reproduce,
    "repeat": repeat,
    "publish": publish,
    "weights": weights,
    "figure": figure,
    "list": list_tables,
    "proofs": proofs,
    "reports": reports,
    "bench": bench,
    "latency": bench,
    "evidence": evidence,
    "train": train,
    "test": test,
    "deploy": deploy,
    "export": export,
}


@contextlib.contextmanager
def together(command: str) -> Iterator[None]:
    """With the processes that torchrun has started, if it has; the first one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if command not in ("run", "train"):
        raise UserError(f"{command} is for one process: run it without torchrun.")
    from replib import parallel

    with Path(os.devnull).open("w") as nowhere, parallel.joined():
        with contextlib.redirect_stdout(nowhere if parallel.place() else sys.stdout):
            yield


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 where a check fails, or 2 with one line for a user's mistake."""
    started = time.monotonic()
    try:
        arguments = parser().parse_args(argv)
        arguments.started = started
        for path in getattr(arguments, "blocks", ()):
            from replib.blocks import own

            own.read(path)
        with together(arguments.command):
            return COMMANDS[arguments.command](arguments) or 0
    except UserError as error:
        print(f"replib: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"replib: {name}{error.strerror or error}.", file=sys.stderr)
        return 2
    except MemoryError as error:
        said = str(error) or "this needs more memory than there is"
        print(f"replib: {said}: run the same command again where there is more.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("replib: stopped; run the same command again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
