"""The frozen types that travel between processes. No torch, no numpy: an idle agent loads this module.

Sizes are bytes, times are seconds unless the name says otherwise. Shapes exclude the batch dimension.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from enum import Enum

from fedepth.budget import Budget
from fedepth.costs import Calibration
from fedepth.data.column_sums import ColumnSums
from fedepth.layout import ITEM_BYTES, Encoding
from fedepth.plan import CacheType, Plan, Policy

MOST_CLASSES = 1 << 15
MOST_DEVICE_NAME = 200  # characters
MOST_NAMES_BYTES = 1 << 20  # of all classes together: they are sent with every task
MOST_NUMBERS = 1 << 28  # in one sample: a picture of 9,000 by 9,000 points in three colours
MOST_BATCH = 1 << 20  # so that sizes of whatever a model makes of a batch stay far below 2^63
MOST_EPOCHS = 1 << 20
MOST_CHANNELS = 1 << 17  # every one has its mean and its standard deviation in the task
MOST_COLUMNS = 1 << 13  # of a table, or of a text's parts
MOST_TOKENS = 1 << 13  # of one text
SMALLEST_VOCABULARY = 4  # two ids are padding and no word
MOST_VOCABULARY = 1 << 20
_UINT16_IDS = 1 << 16


class Optimizer(str, Enum):
    """The optimizers that a job may name."""

    SGD = "sgd"
    ADAMW = "adamw"


class Heads(str, Enum):
    """What a block leads to that does not end with the model's last unit."""

    SHARED = "shared"  # by a skip connection to the model's own head (arXiv 2303.04887, section 4.1)
    AUXILIARY = "auxiliary"  # to a small classifier of its unit's own: m-FeDepth (fedepth.models.auxiliary)


class Distil(str, Enum):
    """What blocks learn from beside the labels."""

    NONE = "none"
    GLOBAL = "global"  # the logits of the global weights that the task begins with


class InputType(str, Enum):
    """What a model's input holds."""

    FLOAT = "float"  # bytes of data, divided by 255 and normalised: images, vectors, series; or the features of a table
    TOKENS = "tokens"  # token ids: of texts, or bytes of data

    @property
    def dtype(self) -> str:
        """The element type as safetensors names it."""
        return {InputType.FLOAT: "F32", InputType.TOKENS: "I64"}[self]


@dataclass(frozen=True)
class DeviceReport:
    """What a device says of itself when it asks for work.

    Attributes:
        instance: drawn at random at each start of an agent and kept nowhere, so that two agents that run with one
            device id, such as from a copied memory card, can be told apart.
        hostname: of the machine that the agent runs on, to find it by.
        class_names: of the class folders whose images `class_counts` counts, after Unicode normalisation (NFC), or of
            the job whose rows it counts. Empty where data has numbers for labels: counts are then by those, from 0 on;
            and where rows were not looked at for any job yet, without counts.
        settings: the fields of `TrainingSpec` that its agent knows; () from agents that do not say so.
        folder_names: where a folder is called as a split, so that only the job's classes tell what it is: the folders
            of images, as `fedepth.data.splits.images_by_class` takes them. They replace `sample_count`, `class_counts`
            and `class_names`. Empty elsewhere.
        folder_counts: of the images in each.
        columns: what the rows have in the numeric columns of a table that the coordinator has asked about.
    """

    device_id: str
    name: str
    budget: Budget
    sample_count: int
    class_counts: tuple[int, ...]
    hardware: str = ""
    accelerator: str = ""
    software: str = ""
    fedepth_version: str = ""
    calibration: Calibration = Calibration()
    instance: str = ""
    hostname: str = ""
    class_names: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    folder_names: tuple[str, ...] = ()
    folder_counts: tuple[int, ...] = ()
    columns: ColumnSums | None = None


@dataclass(frozen=True)
class TextSpec:
    """How a row of a file becomes token ids (fedepth.data.text).

    Attributes:
        label: the column with the class.
        text: the columns with text, which are joined by spaces.
        vocabulary: ids are below it; 0 is padding.
        tokenizer: sha256 (hex) of the job's tokenizer file, which devices get with the graph; "" hashes words.
    """

    label: str
    text: tuple[str, ...]
    vocabulary: int
    tokenizer: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read, without the label."""
        return self.text


@dataclass(frozen=True)
class Category:
    """A column of a table that holds one of these values."""

    name: str
    values: tuple[str, ...]

    @property
    def slots(self) -> int:
        """Of its features: one for each value, and one for a value that is missing or another one."""
        return len(self.values) + 1


@dataclass(frozen=True)
class TableSpec:
    """How a row of a file becomes features (fedepth.data.tables).

    Attributes:
        label: the column with the class.
        numeric: the columns with numbers.
        mean: of each of these, where a number is there.
        std: their standard deviations.
        categorical: the columns with one of a few values.
    """

    label: str
    numeric: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    categorical: tuple[Category, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that are read, without the label."""
        return (*self.numeric, *(each.name for each in self.categorical))

    @property
    def features(self) -> int:
        """How many numbers a model takes of a row."""
        return 2 * len(self.numeric) + sum(each.slots for each in self.categorical)


@dataclass(frozen=True)
class ModelSpec:
    """Which model a job trains.

    Attributes:
        name: a name from the zoo ("digits-cnn", "preresnet20", …), "torchvision:NAME", "timm:NAME", or
            "module:function". Only the coordinator builds it; devices have its graph.
        classes: class names in label order.
        input_shape: (channels, height, width) of images, or any other shape.
        mean: per channel, for values in 0..1; channels are the first dimension.
        std: per channel, for values in 0..1.
        input_type: what the input holds.
        first_label: of data with numbers for labels, the number of the first class.
        text: the data are rows with texts; token ids of shape (length,) go in.
        table: the data are rows of a table; its features go in.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_type: InputType = InputType.FLOAT
    first_label: int = 0
    text: TextSpec | None = None
    table: TableSpec | None = None

    @property
    def columns(self) -> TextSpec | TableSpec | None:
        """What is read of every row; None where the data are no rows of a file."""
        return self.text or self.table

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of a sample as it is stored; a model's input is made of it (fedepth.data.transforms)."""
        return self.input_shape if self.table is None else (len(self.table.columns),)

    @property
    def sample_type(self) -> str:
        """The element type of a sample as it is stored, as safetensors names it."""
        if self.table is not None:
            return "F64"
        if self.text is not None:
            return "U16" if self.text.vocabulary <= _UINT16_IDS else "I32"
        return "U8"

    @property
    def sample_bytes(self) -> int:
        """Of a sample as it is stored."""
        return math.prod(self.sample_shape) * ITEM_BYTES[self.sample_type]


@dataclass(frozen=True)
class TrainingSpec:
    """How a client trains in one round.

    What an agent does not know it cannot obey: a field with a default means by that default what agents did before it
    was there, and a task that says otherwise is given to those only that name the field (`DeviceReport.settings`).

    Attributes:
        distil_weight: λ, of the divergence from what is distilled (fedepth.training.objective).
        distil_temperature: T, by which logits are divided before they are compared.
        mutual: so many models at most, where memory is left for them (mutual knowledge distillation); 1 for none.
        mutual_weight: of what a model learns from the others, beside the loss on the labels.
        mutual_temperature: what logits are divided by for that.
        encoding: of the updates, see fedepth.encoding.
    """

    batch: int
    local_epochs: int
    optimizer: str  # "sgd" or "adamw"
    learning_rate: float
    momentum: float
    weight_decay: float
    proximal_mu: float  # FedProx term; 0 switches it off
    augmentation: str  # "none" or "crop-flip"
    seed: int
    cache_type: CacheType = CacheType.FLOAT32
    fixed_statistics: bool = False  # BatchNorm normalises with the global running statistics, which stay as they are
    heads: Heads = Heads.SHARED
    distil: Distil = Distil.NONE
    distil_weight: float = 1.0
    distil_temperature: float = 1.0
    mutual: int = 1
    mutual_weight: float = 1.0
    mutual_temperature: float = 1.0
    encoding: Encoding = Encoding.FLOAT32

    @property
    def asks_for(self) -> tuple[str, ...]:
        """The fields that do not have their defaults."""
        return tuple(
            each.name
            for each in fields(self)
            if each.default is not MISSING and getattr(self, each.name) != each.default
        )


# What agents know that do not say what they know.
FIRST_SETTINGS = ("cache_type",)
SETTINGS = tuple(each.name for each in fields(TrainingSpec))


@dataclass(frozen=True)
class Task:
    """What a client is asked to do in one round.

    Attributes:
        task_id: names this task for ever; uploads are idempotent under it.
        attempt: counts how often this task was handed to the same device.
        graph_digest: sha256 (hex) of the job's traced model, which a device fetches once (fedepth.models.traced).
        weights_digest: sha256 (hex) of the global weights' safetensors file.
        run_id: another one after a rollback, or where the job has begun anew: what a device keeps from task to task
            belongs to one run.
        index_digest: sha256 (hex) of the weights' index (fedepth.tensor_index), by which a device that has other
            weights fetches only the tensors that it lacks; "" where there is none.
    """

    task_id: str
    attempt: int
    job: str
    round: int
    model: ModelSpec
    training: TrainingSpec
    policy: Policy
    plan: Plan
    graph_digest: str
    graph_bytes: int
    weights_digest: str
    weights_bytes: int
    run_id: str
    index_digest: str = ""
    index_bytes: int = 0


@dataclass(frozen=True)
class StageResult:
    """What one stage needed and did.

    Attributes:
        micro_batch: the smallest that was used; smaller than planned where memory ran short in between.
        rehearsed_peak_bytes: the same peak in the rehearsal, one optimizer step before training began; 0 where the
            stage was planned too late to be rehearsed.
        measured_peak_bytes: VmHWM of the trainer above the task's baseline, while this stage ran.
        measured_anonymous_bytes: sampled anonymous part of it, a lower bound.
        steps: optimizer steps.
        samples_seen: samples times epochs.
        models: that were trained; the losses are those of the one in the update.
    """

    first: int
    last: int
    micro_batch: int
    predicted_peak_bytes: int
    rehearsed_peak_bytes: int
    measured_peak_bytes: int
    measured_anonymous_bytes: int
    budget_bytes: int
    loss_first: float
    loss_last: float
    steps: int
    samples_seen: int
    seconds: float
    models: int = 1


@dataclass(frozen=True)
class PartInfo:
    """One immutable piece of an update: a safetensors file."""

    part: int
    size_bytes: int
    digest: str

    @property
    def file_name(self) -> str:
        """What its file is called, in the folder of its update."""
        return f"part-{self.part:04d}.safetensors"


@dataclass(frozen=True)
class Result:
    """A trained update, without its tensors: those lie in the parts.

    Attributes:
        plan: the plan that was really trained (smaller than the task's if memory shrank).
        trained_units: indices of the units in the parts; which heads are among them follows from the plan.
        allocator: name and version of the memory allocator of the trainer.
        baseline_bytes: resident memory of the trainer before weights and data.
        weights_digest: of the weights that it was trained from, since a record that is restored from a copy hands out
            the same task ids again; "" from agents that do not say so.
    """

    task_id: str
    attempt: int
    device_id: str
    round: int
    sample_count: int
    plan: Plan
    trained_units: tuple[int, ...]
    stages: tuple[StageResult, ...]
    parts: tuple[PartInfo, ...]
    seconds: float
    allocator: str
    baseline_bytes: int
    weights_digest: str = ""

    def trained_from(self, weights_digest: str) -> bool:
        """Whether it can be the answer to a task with these weights, as far as it says."""
        return self.weights_digest in ("", weights_digest)

    def steps(self, training: TrainingSpec) -> int:
        """Optimizer steps of a stage, in the mean: what the change of an update is measured by. At least 1, and no more
        than its samples can give, whatever the device says."""
        said = sum(stage.steps for stage in self.stages) // max(1, len(self.stages))
        return max(1, min(said, training.local_epochs * -(-self.sample_count // training.batch)))


class Outcome(str, Enum):
    """Why a task ended without an update."""

    DECLINED = "declined"  # no plan fits what is free now
    OVER_BUDGET = "over_budget"  # met its limit and no smaller plan fits
    TRAINER_DIED = "trainer_died"
    DATA = "data"
    MODEL = "model"  # its graph is damaged, or asks for what is not run here
    ERROR = "error"
    DIVERGED = "diverged"  # its loss or its weights are not finite any more


@dataclass(frozen=True)
class Failure:
    """A task that ended without an update, as the coordinator is told."""

    task_id: str
    attempt: int
    device_id: str
    outcome: Outcome
    message: str
    needed_bytes: int = 0
    budget_bytes: int = 0


@dataclass(frozen=True)
class Progress:
    """Where a device is in its task. Sent at least every few seconds while it works: it renews the lease."""

    task_id: str
    attempt: int
    device_id: str
    activity: str  # such as "downloading", "rehearsing", "training", "uploading"
    stage: int = 0
    stage_count: int = 0
    first: int = 0
    last: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float = 0.0
    bytes_moved: int = 0
