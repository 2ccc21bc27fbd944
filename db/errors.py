"""The errors a user meets: what was got, what is allowed, what to do next."""


class SrsweepError(Exception):
    """Base of every error that is the user's to mend; the CLI prints its text and exits 2."""


class SpecError(SrsweepError, ValueError):
    """A run specification that no training can carry out."""


class GridError(SrsweepError, ValueError):
    """A grid file that cannot be read; the text names file and line."""


class DataError(SrsweepError, ValueError):
    """A data file or prepared dataset that cannot be used; the text names file and line."""


class StoreError(SrsweepError):
    """The run database cannot be reached, read or written."""


class SchemaVersionError(StoreError):
    """The database has another schema version than this srsweep."""


class LostLeaseError(StoreError):
    """The worker no longer owns its attempt: another one may be running the same run."""


class TransferError(SrsweepError, ValueError):
    """A file to import or a place to export to that does not fit; the text names column and row."""


class AnalysisError(SrsweepError, ValueError):
    """Too few or unsuitable runs for what was asked."""


class LaunchError(SrsweepError):
    """A sweep that cannot be started or did not finish all its runs."""


class SearchError(SrsweepError, ValueError):
    """A search or a piece of advice that cannot be carried out as asked."""
