"""The version of this package, which comes from git's tags."""

try:
    from triton_lstm._version import __version__ as __version__  # setuptools-scm writes it when the package is built
except ImportError:  # a checkout that is not installed
    __version__ = "0+unknown"
