"""Brings the tables of a record to this program's revision.

Revision 0001 is what the versions made that kept no revision in the database; such a record is known by its tables.
Tests keep the result of all revisions equal to `coordinator.store.tables`.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedepth.errors import StateError

NEWEST = "0006"

_FIRST = "0001"
_FIRST_TABLES = {"job", "rounds", "devices", "tasks", "updates", "failures"}


def revision_of(connection: sa.Connection, where: str) -> str | None:
    """The revision of a record; None for a database without tables.

    Raises:
        StateError: its tables are not those of a record. The message names `where` they are.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None:
        return found
    tables = set(sa.inspect(connection).get_table_names()) - {"alembic_version"}
    if not tables:
        return None
    if tables != _FIRST_TABLES:
        raise StateError(
            f"{where} holds the tables {', '.join(sorted(tables))}, which are not a job's record; "
            "name another database, or another --state"
        )
    return _FIRST


def check_revision(connection: sa.Connection, where: str) -> None:
    """Whether this program can read the record as it is.

    Raises:
        StateError: it is empty, of an earlier revision, or of a later one.
    """
    found = revision_of(connection, where)
    if found is None:
        raise StateError(f"{where} holds no job yet; start the coordinator on it first")
    if found != NEWEST:
        _refuse_later(found, where)
        raise StateError(
            f"{where} was made by an earlier version (revision {found}, this program reads {NEWEST}); "
            "start the coordinator on it once, which migrates it"
        )


def migrate(connection: sa.Connection, where: str) -> None:
    """Creates the tables, or brings them to the newest revision, in the transaction of `connection`.

    Raises:
        StateError: the record is of a later revision, or the tables are something else.
    """
    found = revision_of(connection, where)
    if found == NEWEST:
        return
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    if found is not None:
        _refuse_later(found, where)
        if MigrationContext.configure(connection).get_current_revision() is None:
            command.stamp(config, found)
    command.upgrade(config, NEWEST)


def _refuse_later(found: str, where: str) -> None:
    known = {each.revision for each in ScriptDirectory(str(Path(__file__).parent)).walk_revisions()}
    if found not in known:
        raise StateError(
            f"{where} has revision {found}, this program knows revisions up to {NEWEST}; "
            "use the version of fedepth that made it, or a later one"
        )
