"""The YAML file and the environment: read, checked, and refused in one line that names what is wrong."""

from vllm_wanspec.config.endpoints import TOKEN_ENV, DraftEndpoint
from vllm_wanspec.config.settings import (
    CONFIG_ENV,
    EVENTS_ENV,
    HOST_ENV,
    OTHER_ROUTES_ENV,
    PROPOSER,
    TOKEN_FILE_ENV,
    WIDTH_ENV,
    LateSettings,
    MetricsSettings,
    Settings,
    TreeSettings,
    load_settings,
    settings_path,
)

__all__ = [
    "CONFIG_ENV",
    "EVENTS_ENV",
    "HOST_ENV",
    "OTHER_ROUTES_ENV",
    "PROPOSER",
    "TOKEN_ENV",
    "TOKEN_FILE_ENV",
    "WIDTH_ENV",
    "DraftEndpoint",
    "LateSettings",
    "MetricsSettings",
    "Settings",
    "TreeSettings",
    "load_settings",
    "settings_path",
]
