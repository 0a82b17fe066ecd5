"""What a request may say of its drafts: the value of ``wanspec`` in ``vllm_xargs``."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_wanspec.config import TreeSettings
from vllm_wanspec.errors import ConfigError

KEY = "wanspec"
OFF = frozenset({"off", "false", "f", "no", "n", "none", "never", "disable", "disabled", "0", "0.0"})
ON = frozenset({"on", "true", "t", "yes", "y", "enable", "enabled", "1", "1.0"})
RIGHT = 'right is "off", "on", or keys of tree, as in "max_branches=1,branch_depth=4"'
MAX_LENGTH = 1000
"""Characters; to say more of one request takes time from all of them."""
_FILLING = re.compile(r"[\s_-]")


def tree_asked(extra_args: Mapping[str, Any] | None, configured: TreeSettings) -> TreeSettings | None:
    """What a request asks of drafters.

    JSON's false and numbers come as numbers here (vLLM narrows them), and a list stands for its items with commas
    between them.

    Args:
        extra_args: The request's ``vllm_xargs``.
        configured: What requests ask for that say nothing else.

    Returns:
        The settings of its tree; None where it opted out.

    Raises:
        ConfigError: It cannot be understood; one sentence that names the value and what would be right.
    """
    asked = (extra_args or {}).get(KEY)
    if asked is None:
        return configured
    if not isinstance(asked, str | int | float | list):
        raise ConfigError(f"{KEY}: {asked!r:.80} is not understood; {RIGHT}")
    text = ",".join(map(str, asked)) if isinstance(asked, list) else str(asked)
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"{KEY}: {text!r:.80} is longer than {MAX_LENGTH} characters; {RIGHT}")
    items = [item.strip() for item in text.split(",")]
    word = items[0].lower() if len(items) == 1 else None
    if word in OFF:
        return None
    if word in ON:
        return configured
    keys: list[str] = []
    for item in items:
        key, equals, _ = item.partition("=")
        if not equals:
            raise ConfigError(f"{KEY}: {f'{item!r:.80} is not understood' if item else 'says nothing'}; {RIGHT}")
        keys.append(key.strip())
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{KEY}: {key:.80} is given twice; give it once")
    return configured.overridden(text)


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """Refuse a request whose wishes cannot be understood.

    Raises:
        ConfigError: As for `tree_asked`, or a key that can only be a misspelt ours.
    """
    for key in extra_args or ():
        if key != KEY and _FILLING.sub("", str(key)).lower() == KEY:
            raise ConfigError(f"{str(key)!r:.80} is not a known key; it is spelled {KEY}")
    tree_asked(extra_args, TreeSettings())
