"""The common ground of saescope: errors, configuration, artefacts, progress, packaged assets."""

from importlib.metadata import PackageNotFoundError, version

from saescope import moved

try:
    __version__ = version("saescope")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+uninstalled"

moved.install()
