"""From a notebook to a page: papermill executes it, nbconvert turns it into one offline file."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from replib.errors import UserError
from replib.experiments.cells import Plan
from replib.experiments.executor import cores, run_plan
from replib.experiments.params import load_table
from replib.experiments.store import Store, home
from replib.report.notebooks import GENERIC, READERS, changed, notebooks, title
from replib.report.overview import TEMPLATES, index, shell
from replib.report.page import Page
from replib.report.results import Results, profile_path, profiles
from replib.report.standing import Evidence, Recorded
from replib.training.checkpoint import write_bytes
from replib.workers import Workers, keep_no_semaphore

PAGES = 5  # that a further process must have to make, to be worth its start
SILENT = logging.NullHandler()
WORKERS = 4  # processes at most: each holds a network or two of full size


class Tee:
    """What a notebook prints, on to the terminal as it comes."""

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def flush(self) -> None:
        sys.stdout.flush()


def quiet_kernel(log: Path) -> type:
    """A kernel manager whose kernel writes what it says of itself to a file, not to our user.

    What cells print is not affected: it comes back as output of the notebook.
    """
    from jupyter_client.manager import AsyncKernelManager

    class QuietKernelManager(AsyncKernelManager):
        async def _async_pre_start_kernel(self, **options):
            command, options = await super()._async_pre_start_kernel(**options)
            return command, options | {"stderr": log.open("wb")}

    return QuietKernelManager


def notebook_of(table: str) -> str:
    """The notebook of a table: one of its own name, else the one that serves every table."""
    return table if (home() / "notebooks" / f"{table}.ipynb").is_file() else GENERIC


def execute(name: str, parameters: dict, copy: str, here: bool = False) -> Path:
    """Run a notebook with these parameters; returns the executed copy, named `copy`.

    here: in this process, which is quicker, and dies with it (replib.report.in_process).
    Raises: UserError where a cell fails by a user's mistake; the copy is kept for reading.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, engine = home() / "notebooks" / f"{name}.ipynb", None  # None: a kernel
    if not source.is_file():
        raise UserError(f"{name} has no notebook ({source}).")
    if here:
        from replib.report.in_process import NAME as engine
    out = home() / "reports" / "runs" / "notebooks" / f"{copy}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").addHandler(SILENT)  # what ends a run is told below, in one line
    environment = os.environ.copy()
    os.environ["REPLIB_HOME"] = str(home())
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
        papermill.execute_notebook(
            str(source),
            str(out),
            parameters=parameters,
            engine_name=engine,
            kernel_name="python3",
            cwd=str(home()),
            progress_bar=False,
            request_save_on_cell_execute=not here,  # a kernel can die; what it had done is kept
            start_timeout=300,
            kernel_manager_class=quiet_kernel(out.with_suffix(".log")),
            stdout_file=Tee(),
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        if error.ename == "UserError":
            raise UserError(error.evalue) from None
        said = (error.evalue.splitlines() or ["no message"])[0]
        raise UserError(f"{source.name} failed with {error.ename}: {said} (see {out}).") from None
    except KeyboardInterrupt:
        # The interrupted cell's own traceback would be logged when its task is collected.
        logging.getLogger("asyncio").disabled = True
        raise
    except DeadKernelError:
        raise UserError(
            f"the process of {source.name} died (out of memory?): finished cells are kept; run "
            "the same command again."
        ) from None
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return out


def to_html(notebook: Path, page: Path, title: str, code: str = "folded") -> None:
    """Write the page: one file, no scripts, nothing requested from anywhere.

    code: "folded" away below what it made, or "shown" above it.
    """
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    config = Config()
    config.HTMLExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_all_outputs_tags = {"progress"}
    exporter = HTMLExporter(
        config=config, template_name="replib", extra_template_basedirs=[str(TEMPLATES)]
    )
    exporter.register_filter("described", described)
    body, _ = exporter.from_filename(str(notebook), resources={"code": code})
    made = f"{datetime.now():%Y-%m-%d %H:%M}"
    write_bytes(page, shell("base.html.j2", title=title, body=body, made=made).encode())


def described(source: str, heading: str) -> str:
    """What a figure shows, for who does not see it: its section, and what its function says."""
    parts = [f"Figure: {heading}"] if heading else ["Figure"]
    for module, function in re.findall(r"\b(\w*figures)\.(\w+)\(", source):
        if (Path(__file__).parent / f"{module}.py").is_file():
            found = getattr(importlib.import_module(f"replib.report.{module}"), function, None)
            parts.append(" ".join((found.__doc__ or "").partition("\n\n")[0].split()))
    return ". ".join(part.rstrip(".") for part in parts if part) + "."


def reproduce(name: str, profile: str, settings: list[str], here: bool = False) -> Path:
    """The page of a table's profile, or of a notebook that belongs to no table; and the index.

    here: one of several that are rendered in this process, which writes the index itself.
    """
    if name in notebooks():
        return render_notebook(name, profile, settings, here)
    if name not in profiles():
        raise UserError(
            f"no table or notebook {name!r}; there are {', '.join([*profiles(), *notebooks()])}."
        )
    # Mistakes in parameters are found here, before papermill sees them.
    loaded = load_table(profile_path(name, profile), settings, networks=False)
    parameters, used = {"profile": profile, "settings": settings}, notebook_of(name)
    if used == GENERIC:
        parameters["table"] = name
    notebook = execute(used, parameters, f"{name}-{profile}", here)
    page = home() / "reports" / f"{name}-{profile}.html"
    to_html(notebook, page, loaded.title)
    if not here:
        index()
    return page


def reproduce_all(names: list[str], profile: str, settings: list[str], **options) -> Iterator[Path]:
    """The pages of several tables and notebooks, as they are made.

    Their cells are trained first, those of all tables together (options of `run_plan`), so that no
    processor waits for the last cell of a table, and a cell that two of them share is trained once.
    """
    tables = [name for name in names if name not in notebooks()]
    plans = [Results(name, profile, settings).plan for name in tables]
    plan = Plan(weights=set().union(*(one.weights for one in plans)))
    for one in plans:
        plan.cells.update(one.cells)
    done = run_plan(plan, Store(), title=f"{len(tables)} tables:", **options)
    if done.out_of_time:  # pages of what there is: no notebook goes on where this stopped
        os.environ["REPLIB_TRAIN"] = "0"
    for name in names:
        yield reproduce(name, profile, settings, here=True)
    index()


def render_all() -> Iterator[str]:
    """The pages of all that has evidence, as they are made, or in one line why there is none.

    Trains nothing. Notebooks that compute what they show are left alone.
    """
    os.environ["REPLIB_TRAIN"] = "0"
    evidence, jobs = Evidence(), []
    for table, names in profiles().items():
        for profile in names:
            try:
                if Recorded(table, profile, evidence).plan.cells:  # no data is fetched for others
                    jobs.append((table, profile))
            except (UserError, ValueError) as error:
                yield not_rendered(table, profile, error)
    jobs += [(name, "quick") for name in READERS if name in notebooks()]
    workers = min(cores(), len(jobs) // PAGES, WORKERS)
    if workers < 2:
        yield from filter(None, map(rendered, jobs))
        return
    with Workers(workers, "spawn", keep_no_semaphore) as pool:
        yield from filter(None, pool.map(rendered, jobs))


def rendered(job: tuple[str, str]) -> str:
    """The page of one job, or why there is none; nothing where its evidence is on other data."""
    name, profile = job
    if name in profiles():
        try:
            results = Page(name, profile).results
        except (UserError, ValueError) as error:  # wrong parameters, say
            return not_rendered(name, profile, error)
        if not results.own and not results.published:
            return ""
    return str(reproduce(name, profile, [], here=True))


def not_rendered(table: str, profile: str, error: Exception) -> str:
    """Why a page was not made, in one line."""
    return f"{table} {profile}: not rendered: {str(error).splitlines()[0]}"


def render_notebook(name: str, profile: str, settings: list[str], here: bool = False) -> Path:
    """Execute a notebook that stands for itself, and write its page, with its code."""
    if profile != "quick":  # what `make` hands over when nothing is said
        raise UserError(f"profile (={profile!r}): {name} has none; change a parameter by SET.")
    notebook = execute(name, changed(name, settings), name, here)
    page = home() / "reports" / f"{name}.html"
    to_html(notebook, page, title(name), code="shown")
    if not here:
        index()
    return page
