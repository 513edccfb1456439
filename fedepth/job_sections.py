"""The sections of the job file, as types with their bounds. What spans several fields is checked in `job`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedepth.data.damage import MOST_DAMAGED
from fedepth.layout import Encoding
from fedepth.models.graph import MOST_UNITS
from fedepth.plan import MOST_MODELS, CacheType
from fedepth.task import (
    MOST_BATCH,
    MOST_CLASSES,
    MOST_EPOCHS,
    MOST_TOKENS,
    MOST_VOCABULARY,
    SMALLEST_VOCABULARY,
    Distil,
    Heads,
    InputType,
)

DIGITS = "digits"
# Their product stays below 2^63, so that the samples of a round can be added up.
MOST_SAMPLES = 1 << 40
MOST_DEVICES = 1 << 20
MOST_SEED = (1 << 31) - 1
MOST_WORKERS = 1024  # of a simulation, and threads of each
MOST_SECONDS = 10 * 365 * 86400
MOST_NAME = 200  # characters in the name of a class or a model
LOWEST_OPSET, HIGHEST_OPSET = 13, 23  # before 13 operators such as Softmax mean something else; torch goes up to 23
# Of numbers that models are computed with, unless they are 0. A product or a quotient of any two is then finite in
# float32, and so is the step that AdamW makes of its learning rate.
LEAST_FLOAT = 1e-18
MOST_FLOAT = 1e18

MOST_ROUNDS = 1 << 40

AtLeastOne = Annotated[int, Meta(ge=1, le=MOST_ROUNDS)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
TensorName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]
LossWeight = Annotated[float, Meta(gt=0, le=1e6)]
Temperature = Annotated[float, Meta(ge=0.01, le=1000)]  # logits divided by less overflow
Seconds = Annotated[float, Meta(gt=0, le=MOST_SECONDS)]


class JobSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[job]: the rounds.

    Attributes:
        quorum: updates a round needs before it may close; by default more than half of `devices_per_round`.
        gather_s: how long a round waits for more devices before it draws.
        round_deadline_s: after it a round closes with its quorum.
        lease_s: a task without a sign of life for this long is lost.
    """

    name: str
    rounds: AtLeastOne = 10
    devices_per_round: AtLeastOne = 2
    quorum: AtLeastOne | None = None
    round_deadline_s: Seconds = 3600.0
    gather_s: Annotated[float, Meta(ge=0, le=MOST_SECONDS)] = 5.0
    lease_s: Seconds = 60.0
    seed: Annotated[int, Meta(ge=0, le=MOST_SEED)] = 0
    policy: Literal["paper", "auto"] = "auto"

    @property
    def needed(self) -> int:
        """The quorum in force."""
        return self.devices_per_round // 2 + 1 if self.quorum is None else self.quorum


class ModelSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[model]: `classes` are the names in label order, or a number n for "0" to "n-1".

    Attributes:
        weights: a local file with weights to begin with, relative to the job file; empty for fresh ones.
        input_shape: may be left out with [text] or [table], which say what it is.
        input_type: what the data holds: numbers, or token ids.
        first_label: of data with numbers for labels (IDX files), the number of the first class: 1 for EMNIST's letters.
    """

    name: str
    classes: tuple[str, ...] | int
    input_shape: tuple[AtLeastOne, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()
    weights: str = ""
    input_type: InputType = InputType.FLOAT
    first_label: Annotated[int, Meta(ge=0, le=MOST_CLASSES)] = 0


class TextSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[text]: the data are rows of files with texts, which become token ids (`fedepth.data.text`).

    Attributes:
        label: the column with the class.
        text: the column with the text, or several, which are joined by spaces.
        length: tokens of a text; what is longer is cut off, what is shorter is padded.
        vocabulary: so many ids are words hashed to; 8192 by default. With a tokenizer it has as many as that has.
        tokenizer: a file of the tokenizers library, relative to the job file, which devices get; empty hashes words.
    """

    label: str
    text: str | tuple[str, ...]
    length: Annotated[int, Meta(ge=1, le=MOST_TOKENS)] = 128
    vocabulary: Annotated[int, Meta(ge=SMALLEST_VOCABULARY, le=MOST_VOCABULARY)] | None = None
    tokenizer: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those with text."""
        return (self.text,) if isinstance(self.text, str) else self.text


class TableSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[table]: the data are rows of files with these columns (`fedepth.data.tables`).

    `fedepth columns FILE` writes this section.

    Attributes:
        label: the column with the class.
        numeric: the columns with numbers.
        mean: of each of these, over data as the devices have it; a number that is missing counts as the mean. Left
            out with `std`, both are found out from counts and sums of the devices, before the first task.
        std: their standard deviations.
        categorical: the columns with one of a few values, and these.
    """

    label: str
    numeric: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[Positive, ...] = ()
    categorical: dict[str, tuple[str, ...]] = {}


class TrainingSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[training]: what one device does in one round; the learning rate moves over the rounds (docs/methods.md).

    Attributes:
        batch_norm: the statistics that BatchNorm normalises with in training: those of the batch, or from some round
            on the global ones, fixed.
        fixed_after: so many rounds have trained statistics before they are fixed; 0 fixes them from the start.
        heads: what blocks lead to that do not end with the model's last unit.
        distil: what blocks learn from beside the labels.
        distil_weight: λ, of how far a block is from what it is to learn from.
        distil_temperature: T, which softens what both say.
        mutual: a device that has memory left trains so many models at most, each distilling from the others, and
            uploads one; 1 for one model everywhere.
        mutual_weight: of the distillation, beside the loss on the labels.
        mutual_temperature: what logits are divided by for the distillation.
    """

    batch: Annotated[int, Meta(ge=1, le=MOST_BATCH)] = 32
    local_epochs: Annotated[int, Meta(ge=1, le=MOST_EPOCHS)] = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.05
    learning_rate_end: NotNegative = 0.0
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 0.0
    proximal_mu: NotNegative = 0.0
    augmentation: Literal["none", "crop-flip"] = "none"
    cache_type: CacheType = CacheType.FLOAT32
    batch_norm: Literal["trained", "fixed"] = "trained"
    fixed_after: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None
    heads: Heads = Heads.SHARED
    distil: Distil = Distil.NONE
    distil_weight: LossWeight = 1.0
    distil_temperature: Temperature = 1.0
    mutual: Annotated[int, Meta(ge=1, le=MOST_MODELS)] = 1
    mutual_weight: LossWeight = 1.0
    mutual_temperature: Temperature = 1.0


class TransferSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[transfer]: what goes between devices and coordinator.

    Attributes:
        encoding: of updates; what is not float32 is smaller and loses precision (docs/encodings.md).
    """

    encoding: Encoding = Encoding.FLOAT32


class TuningSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tuning]: what is trained of a model that begins with weights of its own ([model] weights).

    Attributes:
        embeddings: whether what comes before the first unit behind which a block may end, such as a Vision
            Transformer's embeddings or a convolutional network's first convolution, is trained with the first block, or
            never.
        last_units: only so many units at the end are trained, and the head; by default all.
        new_classifier: the classifier begins with fresh weights, also where that of the file would fit.
    """

    embeddings: Literal["first-stage", "frozen"] = "first-stage"
    last_units: Annotated[int, Meta(ge=0, le=MOST_UNITS)] | None = None
    new_classifier: bool = False


class TestSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[test]: what every round's model is evaluated on: a folder or file relative to the job file, or "digits".

    Without this section the accuracy stays unknown, and exports are compared on random inputs.

    Attributes:
        most_damaged: share of its image files or rows that may be damaged; they are left out.
    """

    __test__ = False  # the name is the section's, not a test's

    data: str
    most_damaged: Annotated[float, Meta(ge=0, le=1)] = MOST_DAMAGED


class ExportSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[export]: an ONNX file every so many rounds, 0 for only at the end; and what is in it.

    Attributes:
        opset: version of the operator set; by default the lowest that the model needs.
        precision: of weights and most operators; input and output stay float32.
        preprocessing: the file takes the bytes of an image (uint8, 0..255) and normalises them itself.
        output: what the file gives for every class.
        input_name: of the file's input.
        output_name: of the file's output; by default what `output` says.
    """

    every: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    opset: Annotated[int, Meta(ge=LOWEST_OPSET, le=HIGHEST_OPSET)] | None = None
    precision: Literal["float32", "float16"] = "float32"
    preprocessing: bool = False
    output: Literal["logits", "probabilities"] = "logits"
    input_name: TensorName = "images"
    output_name: TensorName | None = None

    @property
    def output_label(self) -> str:
        """The name of the output in force."""
        return self.output_name or self.output


class GuardSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[guard]: when the average of a round is not published. One that gives no finite loss never is.

    Attributes:
        largest_drop: of accuracy on the test data, as a fraction, against the model in force; 1 allows any. Without
            test data it is not known, and only an average that is not finite is kept back.
        pause_after: so many rounds in a row that are not published pause the job.
        learn_norms: refuse an update that goes much further for each step than the others of its round, once there are
            five of them.
    """

    largest_drop: Annotated[float, Meta(gt=0, le=1)] = 1.0
    pause_after: AtLeastOne = 3
    learn_norms: bool = True


class RetentionSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[retention]: what is kept of past rounds. One row of the record stays of every round.

    Attributes:
        keep_last: the weights of so many last rounds; also so many averages that were not published, and so many
            rounds that a rollback took back.
        keep_best: also the weights of the round with the highest accuracy.
        keep_every: also the weights of every n-th round; 0 for none.
        history: of so many rounds the tasks and updates stay in the record.
    """

    keep_last: AtLeastOne = 3
    keep_best: bool = True
    keep_every: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    history: AtLeastOne = 50


class LimitsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[limits]: what a coordinator believes of devices.

    Attributes:
        samples_per_device: a device that reports more is refused, since samples are its weight in the average.
        devices: how many different devices may take part in the job.
    """

    samples_per_device: Annotated[int, Meta(ge=1, le=MOST_SAMPLES)] = 10_000_000
    devices: Annotated[int, Meta(ge=1, le=MOST_DEVICES)] = 10_000


class AggregationSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[aggregation]: how a round's updates become the new weights (`fedepth.aggregation.rules`).

    Attributes:
        trim: of the rule trimmed-mean: the share of values cut off at each end; 0.1 by default.
        max_change: of the rule norm-clipping: the root-mean-square change of an update's parameters, relative to that
            of the model's parameters; by default it is learned in every round.
        faulty: of the rule krum: how many updates of a round may be faulty; 1 by default.
    """

    rule: Literal["mean", "trimmed-mean", "median", "norm-clipping", "krum"] = "mean"
    trim: Annotated[float, Meta(gt=0, lt=0.5)] | None = None
    max_change: Positive | None = None
    faulty: AtLeastOne | None = None


class PrivacySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[privacy]: central differential privacy for whole updates; without this section there is none.

    Attributes:
        clip_norm: bound on the Euclidean norm of an update's change, over all parameters that it holds.
        noise_multiplier: standard deviation of the noise on the sum of the updates, in units of `clip_norm`.
        delta: δ of the (ε, δ) that is told; below 1 / number of devices that may ever take part.
    """

    clip_norm: Positive
    noise_multiplier: Positive
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-6


class JobConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job file that has passed every check.

    `test.data` is absolute or "digits", `model.weights` and `text.tokenizer` absolute or empty.

    Attributes:
        folder: where the job file lies, and a custom model's module may lie; "" if there is no file. Not a setting.
        tokenizer_digest: sha256 (hex) of the file `text.tokenizer`; "" without one. Not a setting.
    """

    job: JobSection
    model: ModelSection
    test: TestSection | None = None
    training: TrainingSection = TrainingSection()
    export: ExportSection = ExportSection()
    guard: GuardSection = GuardSection()
    retention: RetentionSection = RetentionSection()
    limits: LimitsSection = LimitsSection()
    aggregation: AggregationSection = AggregationSection()
    privacy: PrivacySection | None = None
    text: TextSection | None = None
    table: TableSection | None = None
    tuning: TuningSection = TuningSection()
    transfer: TransferSection = TransferSection()
    folder: str = ""
    tokenizer_digest: str = ""

    @property
    def test_data(self) -> str:
        """Where the test data are; empty where the job has none."""
        return "" if self.test is None else self.test.data

    @property
    def tokenizer(self) -> str:
        """Path of the tokenizer's file; empty where the job has none."""
        return "" if self.text is None else self.text.tokenizer

    @property
    def most_damaged(self) -> float:
        """Share of the test data that may be damaged."""
        return MOST_DAMAGED if self.test is None else self.test.most_damaged
