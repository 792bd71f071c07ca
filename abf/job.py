"""A planned stage directory, opened: its configuration, its inputs, the plan it is the end of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from abf.artifacts import read_plan
from abf.cluster.config import LaunchConfig
from abf.documents import parse_document
from abf.errors import ArtifactError
from abf.instance import LAUNCH, origin
from abf.stage import is_finished
from abf.stages import CONFIG, stage_dir


@dataclass(frozen=True)
class Job:
    """A planned stage directory, opened."""

    directory: Path
    document: dict[str, Any]
    results: Path
    accept: tuple[str, ...] = ()
    """Keys of a checkpoint's configuration that may have changed since."""

    @staticmethod
    def open(name: str, path: Path, accept: Sequence[str] = ()) -> Job:
        """Read `config.json` of a stage directory.

        Raises:
            ArtifactError: there is none, or it belongs to another stage.
        """
        directory = stage_dir(path)
        config = directory / CONFIG
        try:
            document = parse_document(config, config.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(
                f"{config} does not exist; `abf plan STUDY.yaml` writes and lists them"
            ) from None
        except ValueError as error:
            raise ArtifactError(
                f"{config} is damaged ({error}); delete it and plan again"
            ) from None
        if document.get("stage") != name:
            raise ArtifactError(
                f"{config} belongs to stage {document.get('stage')!r}, not {name!r}"
            )
        depth = len(Path(document["stage"], document["key"]).parts)
        return Job(directory, document, directory.absolute().parents[depth - 1], tuple(accept))

    def setting(self, name: str, kind: Any = None) -> Any:
        """A part of the configuration, as its config class when one is given."""
        value = self.document["config"][name]
        if kind is None:
            return value
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ArtifactError(
                f"{self.directory / 'config.json'}: {name} is not what the planner writes "
                f"({error.errors()[0]['msg']}); delete the file and plan again"
            ) from None

    def inputs(self, name: str) -> list[Path]:
        """Input stage directories of that name."""
        found = self.document["inputs"][name]
        return [self._place(p) for p in ([found] if isinstance(found, str) else found)]

    def input(self, name: str) -> Path:
        """The one input stage directory of that name."""
        (found,) = self.inputs(name)
        return found

    def all_inputs(self) -> dict[str, list[Path]]:
        """Every input, by name."""
        return {name: self.inputs(name) for name in self.document["inputs"]}

    def finished(self) -> bool:
        """Whether this very work lies here, finished and whole, declared or not.

        Raises:
            ArtifactError: an input is unfinished or damaged.
        """
        # An imported checkpoint's files may have changed; nothing here knows them.
        stage, config = self.document["stage"], self.directory / CONFIG
        if stage == "base" and origin(stage, self.document["config"]):
            return False
        return is_finished(stage, self.directory, inputs=self.all_inputs(), config=config)

    def launch(self) -> LaunchConfig | None:
        """How it is spread over a cluster, if it is a training.

        Raises:
            ArtifactError: the file that says so is damaged.
        """
        path = self.directory / LAUNCH
        if not path.exists():
            return None
        try:
            return LaunchConfig.model_validate_json(path.read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(key) for key in fault["loc"])
            raise ArtifactError(
                f"{path} is damaged ({where}: {fault['msg']}): delete it, and `abf plan` writes it"
            ) from None

    def peak_tflops(self) -> float | None:
        """What the site says that a rank's device can do, if it says it."""
        launch = self.launch()
        return None if launch is None else launch.peak_tflops

    def cores(self) -> int:
        """Processor cores that its work is given, for the ledger."""
        config = self.document["config"]
        places = [config, *(config.get(part, {}) for part in ("train", "decoder", "scoring"))]
        nested = config.get("base", {}).get("train", {})
        return max(part.get("threads", 1) for part in (*places, nested) if isinstance(part, dict))

    def _place(self, relative: str) -> Path:
        return Path(os.path.relpath(self.results / relative))


def plan_of(job: Job) -> Mapping[str, Any]:
    """The plan of the study that a directory is the end of."""
    return read_plan(job.results / "plan" / job.setting("plan"))
