"""What every part of Baton may import, and what a client installs: needs neither torch nor Redis."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("baton")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
