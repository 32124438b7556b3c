"""Errors for the user: the command shows them as one message, without a traceback.

Each is also the built-in error that a Python caller expects, so `except ValueError` works. Mistakes of a programmer,
such as a tensor of the wrong shape, stay built-in errors.
"""

__all__ = [
    "ExistingFileError",
    "InputError",
    "MissingFileError",
    "MissingMethodError",
    "MissingPackageError",
    "NotAFolderError",
    "UnusableFileError",
    "UserError",
]


class UserError(Exception):
    """What a user can mend; the message names the argument or file, the value, and what to do."""


class InputError(UserError, ValueError):
    """An option, or a value in a file, that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class ExistingFileError(UserError, FileExistsError):
    """A file that would be overwritten."""


class UnusableFileError(UserError, OSError):
    """A file or folder that is damaged, or cannot be read, written or fetched."""


class NotAFolderError(UserError, NotADirectoryError):
    """A path that must be a folder, and is not or cannot be one."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed."""


class MissingMethodError(UserError, NotImplementedError):
    """A method that a subclass of the user's has left out."""
