"""Settings as editors, word processors, scripts and people leave them: read, or refused with what is wrong and where.

A new case is a line in ACCEPTED or REFUSED: a name, the bytes of the file, and what the message has to say.
"""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from edge_client.config import load
from fedepth.errors import ConfigError
from fedepth.job import load_config

JOB = """[job]
name = "demo"
rounds = 4
[model]
name = "digits-cnn"
classes = ["Zoë", "b"]
input_shape = [1, 8, 8]
[test]
data = "digits"
"""
CLIENT = 'coordinator = "10.0.0.1:8970"\ndata = "photos"\n[memory]\ncap = "300MiB"\n'


def job(old: str = "", new: str = "") -> bytes:
    """The job file above with one text replaced."""
    assert old in JOB
    return JOB.replace(old, new).encode() if old else JOB.encode()


ACCEPTED = {
    "plain": job(),
    "a byte-order mark": codecs.BOM_UTF8 + job(),
    "line ends of Windows": job().replace(b"\n", b"\r\n"),
    "both": codecs.BOM_UTF8 + job().replace(b"\n", b"\r\n"),
    "no line end at the end": job().rstrip(b"\n"),
    "tabs between and before": job().replace(b" = ", b"\t=\t").replace(b"rounds", b"\trounds"),
    "trailing blanks": job().replace(b"\n", b" \t\n"),
    "comments with anything in them": b"# \xe2\x80\x9csmart\xe2\x80\x9d \xc3\xa9\n" + job(),
    "sections in another order": b"[test]\ndata = 'digits'\n" + job('[test]\ndata = "digits"\n', ""),
    "dotted names": b'job.name = "demo"\njob.rounds = 4\n' + job('[job]\nname = "demo"\nrounds = 4\n', ""),
    "a typographic quotation mark in a text": job('["Zoë", "b"]', '["“a”", "b"]'),
}

REFUSED: dict[str, tuple[bytes, str | tuple[str, ...]]] = {
    "empty": (b"", "job.toml: is empty; a job needs [job] name, [model] name"),
    "only a byte-order mark": (codecs.BOM_UTF8, "job.toml: is empty"),
    "only comments": (b"# nothing here\n", "job.toml: is empty"),
    "UTF-16 with a mark": (JOB.encode("utf-16"), "it is saved as UTF-16; save it as UTF-8"),
    "UTF-16 of the other order": (codecs.BOM_UTF16_BE + JOB.encode("utf-16-be"), "it is saved as UTF-16; save it as"),
    "UTF-16 without a mark": (JOB.encode("utf-16-le"), "it is saved as UTF-16; save it as UTF-8"),
    "UTF-32": (JOB.encode("utf-32"), "it is saved as UTF-32; save it as UTF-8"),
    "Latin-1": (
        JOB.encode("latin-1"),
        ("line 6, column 15: byte 0xeb is not UTF-8", "it is 'ë'", "save the file as UTF-8", "the line is 'classes = "),
    ),
    "Latin-1 after a byte-order mark": (codecs.BOM_UTF8 + b"#\xe9\n", "line 1, column 2: byte 0xe9 is not UTF-8"),
    "line ends of old Macs": (job().replace(b"\n", b"\r"), ("at line 1, column", "carriage return alone")),
    "smart quotes": (
        job('name = "demo"', "name = “demo”"),
        ("at line 2, column 8: ", "'“' at column 8 is a typographic quotation mark", "the line is 'name = “demo”'"),
    ),
    "a smart apostrophe": (job('"digits"', "‘digits’"), ("line 9, column 8", "typographic apostrophe")),
    "a long dash": (job("rounds = 4", "seed = –4"), ("line 3, column 8", "'–' at column 8 is a dash; write -")),
    "a space of another kind": (job("rounds = 4", "rounds\u00a0= 4"), ("line 3, column 7", "space of another kind")),
    "a second byte-order mark": (job("[model]", "\ufeff[model]"), ("line 4", "invisible character")),
    "JSON": (b'{"job": {"name": "demo"}}', "it is JSON; a TOML file has sections as [memory]"),
    "JSON that is damaged": (b'{\n  "job": {"name": "demo",}\n}', "it is JSON"),
    "a list of JSON": (b'[{"name": "demo"}]', "it is JSON"),
    "YAML": (b"job:\n  name: demo\n  rounds: 4\nmodel:\n  name: digits-cnn\n", "it is YAML; a TOML file has"),
    "YAML with a mark": (b"---\njob:\n  - name: demo\n", "it is YAML"),
    "a web page": (b"<!DOCTYPE html>\n<html>\n</html>\n", "it is XML or a web page"),
    "a document": (b"PK\x03\x04" + bytes(40), "it is a ZIP file or a document of a word processor; save it as plain"),
    "rich text": (b"{\\rtf1\\ansi [job]}", "it is a document in rich text"),
    "compressed": (b"\x1f\x8b\x08\x00", "it is compressed with gzip"),
    "a text without quotes": (
        job('name = "demo"', "name = demo"),
        (
            "at line 2, column 8: invalid value",
            'a text stands in quotes, as name = "demo"',
            "the line is 'name = demo'",
        ),
    ),
    "True": (job("rounds = 4", "rounds = True"), ("line 3, column 10", "TOML writes true and false")),
    "null": (job("rounds = 4", "rounds = null"), ("line 3, column 10", "leave the line out")),
    "a comma in a number": (job("rounds = 4", "gather_s = 0,5"), ("line 3, column 13", "numbers are written as 0.5")),
    "a path of Windows": (job('"digits"', '"C:\\Users\\x"'), ("line 9, column", "'single quotes', or twice")),
    "a colon": (job("rounds = 4", "rounds: 4"), ("line 3, column 7", "TOML writes name = value")),
    "a value that is missing": (job("rounds = 4", "rounds ="), ("line 3, column", "the value is missing")),
    "a quotation mark that is missing": (job('"demo"', '"demo'), ("line 2, column", "the line is 'name = \"demo'")),
    "a bracket that is missing": (job("[1, 8, 8]", "[1, 8, 8"), "at line 8, column"),
    "a bracket that is missing at the end": (job('"digits"', '["digits"'), "at line 9, column 17"),
    "a name that is there twice": (job("rounds = 4", "rounds = 4\nrounds = 5"), ("line 4, column", "'rounds = 5'")),
    "a section that is there twice": (job("[test]", "[job]"), ("at line 8, column", "the line is '[job]'")),
    "a control character": (job("demo", "de\x00mo"), ("line 2, column 11", r"""'name = "de\x00mo"'""")),
    "fixed statistics without a round": (
        job("[test]", '[training]\nbatch_norm = "fixed"\n[test]'),
        ("[training] batch_norm", '"fixed" needs fixed_after: after how many rounds', "such as half of them", "line 9"),
    ),
    "a round for statistics that are never fixed": (
        job("[test]", "[training]\nfixed_after = 2\n[test]"),
        ("[training] fixed_after", 'is a setting of batch_norm = "fixed"'),
    ),
    "statistics that are fixed after the end": (
        job("[test]", '[training]\nbatch_norm = "fixed"\nfixed_after = 4\n[test]'),
        ("[training] fixed_after", "must be below [job] rounds (4)"),
    ),
    "a new classifier instead of none": (
        job("[test]", "[tuning]\nnew_classifier = true\n[test]"),
        ("[tuning] new_classifier", "needs [model] weights"),
    ),
    "a setting that is misspelt": (
        job("rounds = 4", "ruonds = 4"),
        "job.toml: [job] ruonds: no such setting; did you mean rounds? (line 3, column 1: 'ruonds = 4')",
    ),
    "a section that is misspelt": (
        job("[model]", "[modle]"),
        "job.toml: [modle]: no such section; did you mean model? (line 4, column 1: '[modle]')",
    ),
    "a setting before any section": (
        b"rounds = 4\n" + job(),
        "[rounds]: no such section; it belongs under [job] (line 1",
    ),
    "a name that is not a setting": (b'folder = "/tmp"\n' + job(), "[folder]: no such section"),
    "a value out of range": (
        job("rounds = 4", "  rounds = 0"),
        ("[job] rounds: ", " (line 3, column 3: 'rounds = 0')"),
    ),
    "a value of another kind": (job("rounds = 4", 'rounds = "4"'), ("expected `int`, got `str`", "(line 3, column 1")),
    "an item of a list": (job("[1, 8, 8]", "[1, 0, 8]"), ("[model] input_shape[1]: ", "(line 7, column 1")),
    "values that do not fit": (
        job("rounds = 4", "quorum = 5"),
        ("quorum: must be at most devices_per_round", "(line 3"),
    ),
    "heads that do not exist": (
        job("[test]", '[training]\nheads = "local"\n[test]'),
        ("[training] heads: invalid enum value 'local'", "(line 9, column 1"),
    ),
    "a teacher that does not exist": (
        job("[test]", "[training]\ndistil = true\n[test]"),
        ("[training] distil: ", "(line 9, column 1"),
    ),
    "nothing to distil by": (
        job("[test]", '[training]\ndistil = "global"\ndistil_weight = 0\n[test]'),
        ("[training] distil_weight: ", "> 0", "(line 10, column 1"),
    ),
    "a temperature of zero": (
        job("[test]", "[training]\ndistil_temperature = 0.0\n[test]"),
        ("[training] distil_temperature: ", ">= 0.01", "(line 9, column 1"),
    ),
    "a temperature that melts everything": (
        job("[test]", "[training]\ndistil_temperature = 1e9\n[test]"),
        ("[training] distil_temperature: ", "<= 1000", "(line 9, column 1"),
    ),
    "distillation that is misspelt": (
        job("[test]", '[training]\ndistill = "global"\n[test]'),
        "[training] distill: no such setting; did you mean distil?",
    ),
    "a section in one line": (
        b"job = {name = 'demo', rounds = 0}\n" + job('[job]\nname = "demo"\nrounds = 4\n', ""),
        ("[job] rounds: ", "(line 1, column 1: "),
    ),
    "a setting that is missing": (job('name = "demo"', ""), "[job] name: is missing (line 1, column 1: '[job]')"),
    "an integer of 65 bits": (
        job("rounds = 4", "rounds = 9223372036854775808"),
        (
            "[job] rounds: is beyond the integers of TOML, which have 64 bits; write one from -9223372036854775808 to "
            "9223372036854775807 (line 3, column 1: 'rounds = 9223372036854775808')",
        ),
    ),
    "one of them in a list": (job("[1, 8, 8]", f"[1, {'9' * 40}]"), ("[model] input_shape: is beyond", "line 7")),
    "one in a table of a section": (job("rounds = 4", f"rounds = {{x = {'9' * 40}}}"), "x: is beyond the integers of"),
    "a sample that no memory holds": (
        job("[1, 8, 8]", "[1, 99999999, 99999999]"),
        "[model] input_shape: must have at most 268435456 numbers in a sample, has 9999999800000001",
    ),
    "a batch that no memory holds": (
        job("[test]", "[training]\nbatch = 2000000\n[test]"),
        ("[training] batch: expected `int` <= 1048576", "(line"),
    ),
    "a path that is empty": (job('"digits"', '""'), ("[test] data: the path is empty; write one", "(line 9")),
    "several things": (
        job('"demo"', '"de mo"').replace(b"rounds = 4", b"quorum = 5").replace(b'"digits"', b'"absent"'),
        (
            "job.toml: 3 things are wrong: (1) [job] name: must be 1 to 64 letters",
            "; (2) [job] quorum: must be at most devices_per_round (2), is 5",
            "; (3) [test] data: ",
        ),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_job_file_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "job.toml").write_bytes(ACCEPTED[name])
    config = load_config(tmp_path / "job.toml")
    assert (config.job.name, config.job.rounds) == ("demo", 4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, says = REFUSED[name]
    (tmp_path / "job.toml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "job.toml")
    message = str(caught.value)
    for part in (says,) if isinstance(says, str) else says:
        assert part in message
    assert message.startswith("job.toml: ")
    assert message.isprintable()


FILES_OF_AGENTS: dict[str, tuple[bytes, str]] = {
    "plain": (CLIENT.encode(), ""),
    "empty": (b"", ""),
    "a byte-order mark": (codecs.BOM_UTF8 + CLIENT.encode(), ""),
    "UTF-16": (CLIENT.encode("utf-16"), "it is saved as UTF-16; save it as UTF-8"),
    "YAML": (b"coordinator: 10.0.0.1:8970\ndata: photos\n", "it is YAML"),
    "JSON": (b'{"data": "photos"}', "it is JSON"),
    "a value out of range": (b"[memory]\nfraction = 1.5\n", "memory.fraction is 1.5, but must be above 0"),
    "its place": (b"[memory]\n\tfraction = 1.5\n", "(line 2, column 2: 'fraction = 1.5')"),
    "a setting that is misspelt": (b"[memory]\ncpa = 3\n", "did you mean memory.cap? (line 2, column 1: 'cpa = 3')"),
    "a size": (b'[memory]\ncap = "3 elephants"\n', "(line 2, column 1: "),
    "a table that is none": (b"memory = 3\n", "(line 1, column 1: 'memory = 3')"),
    "a path that is none": (b'data = "a\\u0000b"\n', "is not a path"),
}


@pytest.mark.parametrize("name", FILES_OF_AGENTS)
def test_the_settings_of_an_agent(tmp_path: Path, name: str) -> None:
    data, says = FILES_OF_AGENTS[name]
    path = tmp_path / "client.toml"
    path.write_bytes(data)
    if not says:
        load(path)
        return
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_option_that_is_wrong_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text(CLIENT, encoding="utf-8")
    with pytest.raises(ConfigError, match=r'^the command line: memory\.cap: "lots" is not a size'):
        load(tmp_path / "client.toml", {"memory.cap": "lots"})


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_what_cannot_be_opened_is_named_in_full(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (load_config, load):
        with pytest.raises(ConfigError, match="cannot be read: ") as caught:
            read(Path(name))
        assert str(caught.value).startswith(str(tmp_path))


# Field, its text in the file, and the path that is meant: relative to the file's folder, wherever the program runs.
PATHS = [
    ("test", "data", "images", "FOLDER/images"),
    ("test", "data", "../shared", "PARENT/shared"),
    ("test", "data", "./digits", "FOLDER/digits"),  # a folder of that name, not the set
    ("model", "weights", "start.safetensors", "FOLDER/start.safetensors"),
    ("model", "weights", "~/start.safetensors", "HOME/start.safetensors"),
]


@pytest.mark.parametrize(("section", "field", "text", "meant"), PATHS)
@pytest.mark.parametrize("there", [True, False])
def test_a_path_counts_from_the_job_file_and_is_said_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, field: str, text: str, meant: str, there: bool
) -> None:
    folder, home, elsewhere = (tmp_path / name for name in ("jobs", "home", "elsewhere"))
    for each in (folder, home, elsewhere):
        each.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = Path(meant.replace("FOLDER", str(folder)).replace("HOME", str(home)).replace("PARENT", str(tmp_path)))
    if there:
        path.mkdir() if field == "data" else path.write_bytes(b"")
    line = f'{field} = "{text}"\n'
    written = job('data = "digits"\n', line) if section == "test" else job("[test]", f"{line}[test]")
    (folder / "job.toml").write_bytes(written)
    monkeypatch.chdir(folder)
    for given, start in (("job.toml", folder), ("../jobs/job.toml", elsewhere)):
        monkeypatch.chdir(start)
        if there:
            assert getattr(getattr(load_config(Path(given)), section), field) == str(path)
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(Path(given))
        assert f"[{section}] {field}: {path} does not exist" in str(caught.value)
        assert repr(text)[1:-1] in str(caught.value)  # the line as it is written


def test_a_home_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    (tmp_path / "job.toml").write_bytes(job('"digits"', '"~/images"'))
    with pytest.raises(
        ConfigError, match="'~/images' is not a path: Could not determine home directory; write the path"
    ):
        load_config(tmp_path / "job.toml")


def test_the_job_knows_where_its_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_bytes(job())
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("job.toml")).folder == str(tmp_path)
