"""A papermill engine that runs the cells of a notebook in this very process.

A kernel takes seconds to start and to import what this process has imported already, and where
pages are rendered one after the other that is most of their time. A notebook that is rendered
alone gets a kernel: its death is not ours.
"""

from __future__ import annotations

import sys
from types import ModuleType

import matplotlib
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import CapturedIO, capture_output
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from traitlets.config import Config

NAME = "in-process"


class InProcess(Engine):
    """Every notebook finds a shell without names; the first cell that fails is the last one."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name: str, **options) -> None:
        matplotlib.use("agg")  # as in a kernel: no window opens
        # Names live in a module of their own: a shell's is __main__, which a worker process that
        # is started later would look for in vain.
        shell = InteractiveShell.instance(
            config=Config({"HistoryManager": {"enabled": False}}), user_module=ModuleType("page")
        )
        shell.reset()
        # A shell in a terminal shows plain text alone; a page wants all there is.
        shell.display_formatter.active_types = shell.display_formatter.format_types
        select_figure_formats(shell, {"png"}, bbox_inches="tight")
        for index, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, index)
            if cell.cell_type == "code":
                with capture_output() as captured:
                    shell.display_trap.hook = sys.displayhook  # the one that captures
                    done = shell.run_cell(cell.source)
                cell.outputs = outputs(captured)
                if error := done.error_before_exec or done.error_in_exec:
                    if isinstance(error, KeyboardInterrupt):
                        raise error
                    told = {"ename": type(error).__name__, "evalue": str(error), "traceback": []}
                    cell.outputs.append(new_output("error", **told))
                    nb_man.cell_exception(cell, index, exception=error)
                    break  # papermill raises what the output says
            nb_man.cell_complete(cell, index)


def outputs(captured: CapturedIO) -> list[NotebookNode]:
    """What a cell printed and showed, as a notebook holds it."""
    streams = {"stdout": captured.stdout, "stderr": captured.stderr}
    said = [new_output("stream", name=name, text=text) for name, text in streams.items() if text]
    shown = [
        new_output("display_data", data=output.data, metadata=output.metadata)
        for output in captured.outputs
    ]
    return said + shown


papermill_engines.register(NAME, InProcess)
