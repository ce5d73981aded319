"""The version of the SDK; it moves with the service's."""

__version__ = "0.1.0"
