"""What an evidence file must hold, before a page shows it or a bundle is taken in.

`store.read_evidence` says whether a file is whole; this says whether what is in it is a result.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from replib.experiments.store import sha256

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Whole = Annotated[float, Field(ge=0, lt=2**63)]  # FLOPs of shares of an epoch may be no integer
Text = Annotated[str, Field(max_length=1000)]
Column = list[bool | int | float | str | list | dict | None]


class Loose(BaseModel):
    """What must be there is of its type; what else there is, is let be."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Data(Loose):
    name: Text
    digest: Text
    test_images: Count


class Images(Loose):
    train: Count
    held_out: Count


class Final(Loose):
    last: Fraction
    selected: Fraction
    selected_by: Text
    selected_epoch: Count


class Deployed(Loose):
    """Scores of the test split are named test_METRIC: test_accuracy, test_mAP, ..."""

    parameters: Count
    flops: Whole
    views: dict[str, Fraction] = {}

    @model_validator(mode="after")
    def is_scored(self):
        scores = [value for name, value in self if name.startswith("test_")]
        if not scores:
            raise ValueError("there is no test_accuracy, nor another score of the test split")
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in scores):
            raise ValueError("a score of the test split is no number between 0 and 1")
        return self


class Compute(Loose):
    epochs: Count
    training_flops: Whole
    teacher_flops: Whole


class Taught(Loose):
    name: Text
    test_accuracy: Fraction


class Result(Loose):
    """The part that is hashed."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    parameters: dict[str, Any]
    data: Data
    versions: dict[str, int | Text]  # a file of one's own blocks has the hash of its contents
    images: Images
    history: dict[str, Column]
    restarts: dict[str, Column]
    kept_blocks: dict[str, Any]
    final: Final
    deployed: Deployed
    compute: Compute
    teacher: Taught | None = None

    @model_validator(mode="after")
    def columns_are_of_one_length(self):
        """A row for every epoch, and for every restart."""
        for name in ("history", "restarts"):
            if len({len(column) for column in getattr(self, name).values()}) > 1:
                raise ValueError(f"the columns of {name} are of different lengths")
        scored = any(name.startswith("test_") for name in self.history)
        if not scored or "train_loss" not in self.history:
            raise ValueError("history has no train_loss, or no score of the test split")
        if self.final.selected_epoch >= len(self.history["train_loss"]):
            raise ValueError("history has not what final says")
        return self


class Context(Loose):
    commit: Text
    device: Text
    processor: Text
    python: Text
    libraries: dict[str, Text]
    wall_seconds: Whole

    @model_validator(mode="after")
    def names_torch(self):
        """The one library that pages name."""
        if "torch" not in self.libraries:
            raise ValueError("libraries has no torch")
        return self


class Evidence(Loose):
    result: Result
    context: Context


def problem(evidence: dict) -> str | None:
    """What is wrong with evidence that is whole; None where a page can show it."""
    try:
        Evidence.model_validate(evidence)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    except RecursionError:
        return "it is nested too deep"
    return None


def key_problem(evidence: dict) -> str | None:
    """The same, and where its key is not the one of its own parameters, data and versions."""
    if said := problem(evidence):
        return said
    result = evidence["result"]
    made = {key: result[key] for key in ("parameters", "versions")}
    if sha256(made | {"data": result["data"]["digest"]}) != result["key"]:
        return "result.key: it is not the hash of the parameters, data and versions"
    return None
