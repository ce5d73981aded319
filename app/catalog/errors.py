"""What the catalog can refuse.

CatalogError
├── NotFound        nothing has that id or name
├── AlreadyExists   the unique name is taken
├── Conflict        the thing is in a state that does not allow it
│   └── Damaged     its files are not those that were written
├── Unavailable     the database does not answer, or has no connection left
└── WrongSchema     the database was migrated to another revision than the code's
"""


class CatalogError(Exception):
    """Base: a sentence for the caller and the request field at fault."""

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class NotFound(CatalogError):
    """Nothing has that id or name."""


class AlreadyExists(CatalogError):
    """The unique name is taken."""


class Conflict(CatalogError):
    """The thing exists, but its state does not allow what was asked."""


class Damaged(Conflict):
    """Its files are not those that were written; a repair makes them so."""


class Unavailable(CatalogError):
    """The database does not answer, or has no connection left: the same request may well succeed later."""


class WrongSchema(CatalogError):
    """The database was migrated to another revision than the code's."""
