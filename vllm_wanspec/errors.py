"""The exceptions this package raises on purpose.

Every one derives from :class:`WanspecError`.  The class says whose fault it is, so that a
caller can tell a bad setting from a bad peer without reading the message.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "RemoteProtocolError",
    "UnsupportedError",
    "WanspecError",
]


class WanspecError(Exception):
    """Base of every exception this package raises on purpose."""


class ConfigError(WanspecError):
    """A setting, argument or file on this side is wrong; the command line exits with 2.

    The message is one line and names the setting, the value and what was expected.
    """


class UnsupportedError(WanspecError):
    """The installed vLLM, or a feature asked of it, is not supported here."""


class RemoteProtocolError(WanspecError):
    """The peer broke the wire protocol."""
