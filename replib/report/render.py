"""From a notebook to a page: papermill executes it, nbconvert turns it into one offline file."""

from __future__ import annotations

import logging
import os
import sys
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from replib.errors import UserError
from replib.experiments.params import load_table
from replib.experiments.store import home
from replib.report.results import profile_path, profiles
from replib.training.checkpoint import write_bytes

TEMPLATES = Path(__file__).parent / "templates"


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


def execute(table: str, profile: str, settings: list[str]) -> Path:
    """Run the table's notebook with these parameters; returns the executed copy.

    Raises: UserError where a cell fails by a user's mistake; the copy is kept for reading.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source = home() / "notebooks" / f"{table}.ipynb"
    if not source.is_file():
        raise UserError(f"{table} has no notebook ({source}).")
    out = home() / "reports" / "runs" / "notebooks" / f"{table}-{profile}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ.copy()
    os.environ["REPLIB_HOME"] = str(home())
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
        papermill.execute_notebook(
            str(source),
            str(out),
            parameters={"profile": profile, "settings": settings},
            kernel_name="python3",
            cwd=str(home()),
            progress_bar=False,
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


def to_html(notebook: Path, page: Path, title: str) -> None:
    """Write the page: one file, no scripts, nothing requested from anywhere."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    config = Config()
    config.HTMLExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_all_outputs_tags = {"progress"}
    exporter = HTMLExporter(
        config=config, template_name="replib", extra_template_basedirs=[str(TEMPLATES)]
    )
    body, _ = exporter.from_filename(str(notebook))
    made = f"{datetime.now():%Y-%m-%d %H:%M}"
    write_bytes(page, shell("page.html.j2", title=title, body=body, made=made).encode())


def shell(template: str, **values) -> str:
    """Fill one of our page templates; values are escaped, `body` is HTML already."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template(template).render(**values)


def reproduce(table: str, profile: str, settings: list[str]) -> Path:
    """Check the parameters, execute the notebook, write the page and the index."""
    # Mistakes in parameters are found here, before papermill sees them.
    loaded = load_table(profile_path(table, profile), settings)
    notebook = execute(table, profile, settings)
    page = home() / "reports" / f"{table}-{profile}.html"
    to_html(notebook, page, loaded.title)
    index()
    return page


def index() -> Path:
    """Write reports/index.html: every profile of every table, and the pages that exist."""
    rows = []
    for table, names in profiles().items():
        for profile in names:
            page = home() / "reports" / f"{table}-{profile}.html"
            row = {"table": table, "profile": profile, "title": "", "data": "", "seeds": ""}
            try:
                loaded = load_table(profile_path(table, profile))
                row |= {
                    "title": loaded.title,
                    "data": loaded.cell.get("data", ""),
                    "seeds": len(loaded.seeds),
                }
            except UserError as error:  # one bad file must not hide the others
                row["title"] = str(error)
            if page.is_file():
                made = datetime.fromtimestamp(page.stat().st_mtime)
                row |= {"page": page.name, "made": f"{made:%Y-%m-%d %H:%M}"}
            rows.append(row | {"command": f"make reproduce-{table} PROFILE={profile}"})
    out = home() / "reports" / "index.html"
    write_bytes(out, shell("index.html.j2", title="Reports", rows=rows).encode())
    return out
