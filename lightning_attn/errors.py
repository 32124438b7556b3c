"""Errors that the command line shows as one message, without a traceback.

Each is also the built-in error that a Python caller expects, so that `except ValueError` works. Programming errors,
such as a tensor of the wrong shape, are built-in errors.
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
    """An error that the user can fix; the message names the argument or file, the value, and the fix."""


class InputError(UserError, ValueError):
    """An option, or a value in a file, that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file that would be overwritten."""


class UnusableFileError(UserError, OSError):
    """A file or folder that is damaged, or cannot be read, written or downloaded."""


class NotAFolderError(UserError, NotADirectoryError):
    """A path that must be a folder, and is not or cannot be one."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed."""


class MissingMethodError(UserError, NotImplementedError):
    """A required method that a user's subclass does not define."""
