"""Known vulnerabilities of the locked packages, asked of the advisory service by pip-audit.

Status 1 for a vulnerability that is not accepted in SECURITY.md. Where nothing could be asked (no
network, no such service at the index, no pip-audit), a line says so, and the status is 0: whether
the code is in order does not depend on a network.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180  # after which the service counts as out of reach
COMMAND = [
    sys.executable, "-m", "pip_audit", "--requirement", "requirements.hashes", "--no-deps",
    "--disable-pip", "--format", "json", "--progress-spinner", "off",
]  # fmt: skip


def judged(answer: str, accepted: str) -> tuple[list[str], bool]:
    """(what is to be said, whether it is bad) of pip-audit's JSON.

    accepted: a text that names the vulnerabilities that are known and lived with.
    """
    packages = json.loads(answer)["dependencies"]
    asked = [one for one in packages if "skip_reason" not in one]
    found = [(one, bug) for one in asked for bug in one["vulns"]]
    new = [(one, bug) for one, bug in found if bug["id"] not in accepted]
    said = [
        f"audit: {one['name']} {one['version']}: {bug['id']}, "
        f"mended in {', '.join(bug['fix_versions']) or 'no version yet'}"
        for one, bug in new
    ]
    if not asked:
        said.append(f"audit: NOT DONE: the service knows none of the {len(packages)} packages.")
        return said, False
    said.append(
        f"audit: {len(asked)} of {len(packages)} packages asked for, {len(new)} vulnerabilities "
        f"that SECURITY.md does not accept, {len(found) - len(new)} that it does."
    )
    if missing := [one["name"] for one in packages if "skip_reason" in one]:
        said.append(f"audit: NOT ASKED FOR, unknown to the service: {', '.join(missing)}.")
    return said, bool(new)


def main() -> int:
    """Ask, and say what there is."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: NOT DONE: pip-audit is not installed (pip install pip-audit).")
        return 0
    try:
        done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        said, bad = judged(done.stdout, (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("audit: NOT DONE: the advisory service could not be reached.")
        return 0
    print("\n".join(said))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
