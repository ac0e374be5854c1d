"""The trained networks of a table as files that people can use (`make weights`).

FOLDER/ROW-seedN.safetensors   the selected network in its training form: `replib test`,
                               `replib deploy` and `replib.checkpoint.load_model` read it
FOLDER/SHA256SUMS              of these files, as sha256sum writes them
FOLDER/models.json             which cell each is, its accuracy, the SHA-256 of its weights, and
                               whether the published evidence has the same
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from replib.checkpoint import save_model
from replib.experiments.cells import Plan, trained_model
from replib.experiments.store import Store
from replib.experiments.weights import file_digest, weights_digest
from replib.training.checkpoint import write_bytes

SAID = {
    "same": "the published weights, bit for bit",
    "other": "other weights than the published ones, as on another processor",
    "unknown": "without a published hash to compare with",
}


def standing(key: str, digest: str, store: Store) -> str:
    """A key of `SAID`: how weights compare with what the published evidence says of them."""
    evidence = store.read(key, published=True)
    published = evidence and evidence["context"].get("weights_sha256")
    if published is None:
        return "unknown"
    return "same" if published == digest else "other"


def write_networks(plan: Plan, store: Store, folder: Path) -> Counter:
    """Write the network of every row and seed; how many stand how, by `SAID`.

    Raises: UserError where weights are not on this machine.
    """
    records, sums = [], []
    for (row, seed), key in plan.by_row.items():
        name = f"{row.replace('/', '-')}-seed{seed}.safetensors"
        model = trained_model(plan.cells[key], store)
        save_model(model, folder / name)
        digest, evidence = weights_digest(model.state_dict()), store.read(key)
        records.append(
            {
                "file": name,
                "row": row,
                "seed": seed,
                "cell": key,
                "test_accuracy": evidence["result"]["final"]["selected"] if evidence else None,
                "weights_sha256": digest,
                "published": standing(key, digest, store),
            }
        )
        sums.append(f"{file_digest(str((folder / name).resolve()))}  {name}\n")
    write_bytes(folder / "models.json", (json.dumps(records, indent=1) + "\n").encode())
    write_bytes(folder / "SHA256SUMS", "".join(sums).encode())
    return Counter(record["published"] for record in records)
