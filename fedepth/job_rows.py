"""The sections [text] and [table] of a job file: what is wrong with them, and what they say of the model's input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from fedepth.data.column_sums import Statistics
from fedepth.data.labels import listed, normalised
from fedepth.data.text import NO_WORD, read_tokenizer, tokenizer_digest, tokenizer_vocabulary
from fedepth.errors import ConfigError
from fedepth.job_sections import (
    DIGITS,
    MOST_NAME,
    JobConfig,
    TableSection,
    TextSection,
)
from fedepth.models.catalog import DEFAULT_VOCABULARY
from fedepth.printable import printable
from fedepth.task import (
    MOST_CHANNELS,
    MOST_COLUMNS,
    MOST_NAMES_BYTES,
    MOST_VOCABULARY,
    Category,
    InputType,
    TableSpec,
    TextSpec,
)

Wrong = tuple[str, str, str]  # section, field, what


def text_spec(config: JobConfig) -> TextSpec | None:
    """[text] as devices get it."""
    section = config.text
    if section is None:
        return None
    columns = tuple(map(_column, section.columns))
    vocabulary = section.vocabulary or DEFAULT_VOCABULARY
    return TextSpec(_column(section.label), columns, vocabulary, config.tokenizer_digest)


def table_spec(config: JobConfig) -> TableSpec | None:
    """[table] as devices get it."""
    section = config.table
    if section is None:
        return None
    categorical = (Category(_column(name), tuple(map(_column, each))) for name, each in section.categorical.items())
    numeric = tuple(map(_column, section.numeric))
    return TableSpec(_column(section.label), numeric, section.mean, section.std, tuple(categorical))


def lacks_statistics(config: JobConfig) -> bool:
    """Whether mean and standard deviation of the job's columns have to be asked of the devices."""
    table = config.table
    return table is not None and len(table.numeric) > len(table.mean)


def with_statistics(config: JobConfig, found: Statistics | None) -> JobConfig:
    """The job with what its devices know of its columns, if it had to be asked for."""
    if config.table is None or found is None or not lacks_statistics(config):
        return config
    return structs.replace(config, table=structs.replace(config.table, mean=found.mean, std=found.std))


def with_row_input(config: JobConfig) -> JobConfig:
    """The job with the input that its rows make."""
    table = table_spec(config)
    if config.text is not None:
        shape, kind = (config.text.length,), InputType.TOKENS
    elif table is not None:
        shape, kind = (table.features,), InputType.FLOAT
    else:
        return config
    return structs.replace(config, model=structs.replace(config.model, input_shape=shape, input_type=kind))


def with_tokenizer(config: JobConfig, path: Path) -> JobConfig:
    """The job with what its tokenizer says.

    Raises:
        ConfigError: it is not one, or has too many words.
    """
    assert config.text is not None, "only texts have a tokenizer"
    name = printable(str(path))
    if not path.is_file():
        raise ConfigError(f"{name} {'is not a file' if path.exists() else 'does not exist'}")
    contents = read_tokenizer(path)
    vocabulary, _ = tokenizer_vocabulary(contents.encode(), name)
    if not NO_WORD < vocabulary <= MOST_VOCABULARY:
        raise ConfigError(f"{name} has {vocabulary} words; {NO_WORD + 1} to {MOST_VOCABULARY} are used")
    text = structs.replace(config.text, tokenizer=str(path), vocabulary=vocabulary)
    return structs.replace(config, text=text, tokenizer_digest=tokenizer_digest(contents))


def wrong_rows(config: JobConfig) -> Wrong | None:
    """The first thing that is wrong with the sections about rows, or with others because of them."""
    section = config.text or config.table
    if section is None:
        return None
    name = "text" if config.text is not None else "table"
    if config.text is not None and config.table is not None:
        return "table", "", "a job trains on texts or on a table; remove [text] or [table]"
    of_section = _wrong_text(config.text) if config.text is not None else None
    of_section = _wrong_table(config.table) if config.table is not None else of_section
    if of_section is not None:
        return (name, *of_section)
    return _wrong_beside(config, name)


def _wrong_beside(config: JobConfig, name: str) -> Wrong | None:
    model, shape = config.model, with_row_input(config).model.input_shape
    if model.input_shape and model.input_shape != shape:
        return "model", "input_shape", f"follows from [{name}] and is {list(shape)}; leave it out"
    if config.table is not None and model.input_type is InputType.TOKENS:
        return "model", "input_type", "is float with [table]; leave it out"
    for field in ("mean", "std"):
        if getattr(model, field):
            instead = "; [table] has its own" if name == "table" else ""
            return "model", field, f"is for images; leave it out with [{name}]{instead}"
    if config.training.augmentation != "none":
        return "training", "augmentation", f'is for images, must be "none" with [{name}]'
    if config.test_data == DIGITS:
        return "test", "data", f"digits are images, the job has [{name}]; name a file with rows"
    return None


def _wrong_text(section: TextSection) -> tuple[str, str] | None:
    if section.tokenizer and section.vocabulary is not None:
        return "vocabulary", "is what the tokenizer says; leave it out"
    return _wrong_columns("text", section.columns) or _wrong_label(section.label, section.columns)


def _wrong_table(section: TableSection) -> tuple[str, str] | None:
    names = (*section.numeric, *section.categorical)
    if not names:
        return "numeric", "names no column, and categorical neither; `fedepth columns FILE` writes the section"
    found = _wrong_columns("numeric" if section.numeric else "categorical", names) or _wrong_label(section.label, names)
    if found is not None:
        return found
    for field in ("mean", "std"):
        count = len(getattr(section, field))
        if count != len(section.numeric) and (section.mean or section.std):
            what = f"must have one number for each column in numeric ({len(section.numeric)}), has {count}"
            return field, f"{what}; `fedepth columns FILE` writes the section; without mean and std, devices are asked"
    for column, values in section.categorical.items():
        known = Counter(map(_column, values))
        twice = [value for value, times in known.items() if times > 1]
        if not values or "" in known or twice:
            what = (
                f"{listed(twice)} occurs more than once" if twice else "values must not be empty, nor the list of them"
            )
            return "categorical", f"{listed([column])}: {what}"
        if max(map(len, values)) > MOST_NAME:
            return "categorical", f"{listed([column])}: values have at most {MOST_NAME} characters"
    size = sum(len(text.encode()) for text in (*names, *(each for row in section.categorical.values() for each in row)))
    if size > MOST_NAMES_BYTES:
        return "categorical", f"columns and values have {size} bytes together, at most {MOST_NAMES_BYTES} are sent"
    features = 2 * len(section.numeric) + sum(len(values) + 1 for values in section.categorical.values())
    if features > MOST_CHANNELS:
        return "categorical", f"the columns make {features} features, at most {MOST_CHANNELS} are used"
    return None


def _wrong_columns(field: str, names: Sequence[str]) -> tuple[str, str] | None:
    if not 1 <= len(names) <= MOST_COLUMNS:
        return field, f"must name 1 to {MOST_COLUMNS} columns, names {len(names)}"
    if not all(1 <= len(_column(name)) <= MOST_NAME for name in names):
        return field, f"names of columns have 1 to {MOST_NAME} characters"
    twice = [name for name, times in Counter(map(_column, names)).items() if times > 1]
    return (field, f"{listed(twice)} is named more than once") if twice else None


def _wrong_label(label: str, names: Sequence[str]) -> tuple[str, str] | None:
    if not 1 <= len(_column(label)) <= MOST_NAME:
        return "label", f"the name of a column has 1 to {MOST_NAME} characters"
    if _column(label) in map(_column, names):
        return "label", f"{listed([label])} is also among the columns that the model is given, which would tell it"
    return None


def _column(name: str) -> str:
    """As it is compared."""
    return normalised(name.strip())
