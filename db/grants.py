"""Least-privilege roles on PostgreSQL: a writer for drivers and workers, a reader for the rest.

Neither may change the schema or delete what was measured. Statements carry no password in clear:
the server gets the same salted verifier that it would store.
"""

from typing import Any, Literal

from sqlalchemy.engine import make_url

from db import migrate
from db.connect import shown, sqlite_path, translated, write_engine
from db.errors import StoreError
from db.schema import VIEWS, metadata

Role = Literal["reader", "writer"]

_UPDATED = {
    "sweeps": ("grid", "launched_at"),
    "runs": ("status", "reason", "skipped_by", "updated_at"),
    "attempts": ("status", "lease_until", "lease_seconds", "heartbeat_at", "ended_at", "last_step",
                 "error_class", "error_message", "requested_bytes", "allocated_bytes",
                 "total_bytes"),
    "run_summary": None,
}  # fmt: skip
"""Columns that change after their row was made; None for every one."""


def grant(url: str, role: Role, name: str, *, password: str | None = None) -> list[str]:
    """Let a user of a PostgreSQL server read, or read and write, a run database, and no more.

    What the user had before in this schema is taken away first, so the same call narrows a role
    again. Tables of a later schema version need another call.

    Parameters
    ----------
    url : str
        Run database, as its owner or a superuser.
    role : {'reader', 'writer'}
        What the user may do.
    name : str
        The user; made if there is none.
    password : str, optional
        For a user that is made or gets a new one.

    Returns
    -------
    list of str
        What was done, a line each.

    Raises
    ------
    StoreError
        SQLite, no such right, or a new user without a password.
    """
    if sqlite_path(url) is not None:
        raise StoreError(
            f"{shown(url)}: SQLite has no users; give the file to a group (chgrp, chmod 640)"
        )
    if role not in ("reader", "writer"):
        raise StoreError(f"role {role!r} is unknown; use 'reader' or 'writer'")
    if not name or "\x00" in name or name == make_url(url).username:
        raise StoreError(f"{name!r} cannot be the {role}; name another user than the one of --db")
    engine = write_engine(url)
    try:
        with translated(url), engine.begin() as connection:
            migrate.check(connection)
            driver: Any = connection.connection.driver_connection
            done = _make_user(driver, role, name, password)
            _narrow(driver, name)
            _allow(driver, role, name)
    finally:
        engine.dispose()
    rights = "read" if role == "reader" else "read, add and update"
    return [*done, f"{name} may {rights} in {shown(url)}, nothing else of it"]


def _make_user(driver: Any, role: Role, name: str, password: str | None) -> list[str]:
    from psycopg import sql

    user = sql.Identifier(name)
    known = driver.execute(
        "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = %s", (name,)
    ).fetchone()
    if known is not None and known[0]:
        raise StoreError(f"{name!r} is a superuser, whom no grant binds; name another user")
    if known is None and not password:
        raise StoreError(f"there is no user {name!r}; give a password to make one")
    done = []
    if password:
        # the verifier, not the password, is what a server log could show
        verifier = driver.pgconn.encrypt_password(
            password.encode(), name.encode(), b"scram-sha-256"
        ).decode()
        verb = "CREATE" if known is None else "ALTER"
        statement = sql.SQL(verb + " ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD {}")
        driver.execute(statement.format(user, sql.Literal(verifier)))
        done.append(f"{name} {'made' if known is None else 'has a new password'}")
    database = sql.Identifier(driver.info.dbname)
    read_only = "on" if role == "reader" else "off"
    driver.execute(
        sql.SQL("ALTER ROLE {} IN DATABASE {} SET default_transaction_read_only = {}").format(
            user, database, sql.SQL(read_only)
        )
    )
    return done


def _narrow(driver: Any, name: str) -> None:
    from psycopg import sql

    user, database = sql.Identifier(name), sql.Identifier(driver.info.dbname)
    for what in ("ALL TABLES IN SCHEMA public", "ALL SEQUENCES IN SCHEMA public", "SCHEMA public"):
        driver.execute(sql.SQL("REVOKE ALL ON " + what + " FROM {}").format(user))
    driver.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(database, user))
    for table, columns in _UPDATED.items():
        if columns:
            driver.execute(
                sql.SQL("REVOKE UPDATE ({}) ON {} FROM {}").format(
                    _names(columns), sql.Identifier(table), user
                )
            )


def _allow(driver: Any, role: Role, name: str) -> None:
    from psycopg import sql

    user, database = sql.Identifier(name), sql.Identifier(driver.info.dbname)
    driver.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, user))
    driver.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(user))
    tables = [*metadata.tables, *VIEWS, migrate.VERSION_TABLE]
    driver.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(_names(tables), user))
    if role == "reader":
        return
    driver.execute(sql.SQL("GRANT INSERT ON {} TO {}").format(_names([*metadata.tables]), user))
    for table, columns in _UPDATED.items():
        listed = sql.SQL(" ({})").format(_names(columns)) if columns else sql.SQL("")
        driver.execute(
            sql.SQL("GRANT UPDATE{} ON {} TO {}").format(listed, sql.Identifier(table), user)
        )
    # a later result on the same device class takes the place of an earlier one
    driver.execute(sql.SQL("GRANT DELETE ON run_summary, packed_summaries TO {}").format(user))
    driver.execute(sql.SQL("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {}").format(user))


def _names(names: Any) -> Any:
    from psycopg import sql

    return sql.SQL(", ").join(sql.Identifier(name) for name in names)
