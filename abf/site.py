"""The site file: who pays and where jobs go, from ABF_SITE or ~/.config/abf/site.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from abf.checked import in_file, read_yaml, validate
from abf.cluster.config import NodeConfig, SiteConfig, StorageConfig
from abf.errors import ConfigError


def site_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the site file is looked for."""
    if named := environment.get("ABF_SITE"):
        return Path(named)
    home = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "abf" / "site.yaml"


def load_node(environment: Mapping[str, str] = os.environ) -> NodeConfig:
    """What a full node is; Leonardo's where there is no site file (reading another's results)."""
    known = site_path(environment).exists() or environment.get("ABF_ACCOUNT")
    return load_site(environment).node if known else NodeConfig()


def job_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs of a node that jobs are submitted to; 0 where nothing is submitted."""
    return load_node(environment).gpus if environment.get("ABF_SUBMIT") else 0


def load_storage(environment: Mapping[str, str] = os.environ) -> StorageConfig:
    """Where files live; nothing is known of that where there is no site file."""
    known = site_path(environment).exists() or environment.get("ABF_ACCOUNT")
    return load_site(environment).storage if known else StorageConfig()


def load_site(environment: Mapping[str, str] = os.environ) -> SiteConfig:
    """Settings of this site; ABF_ACCOUNT goes before the file's account.

    Raises:
        ConfigError: no account anywhere, or a key that is misspelt or impossible; names the file.
    """
    path = site_path(environment)
    account = environment.get("ABF_ACCOUNT")
    if not path.exists() and (not account or "ABF_SITE" in environment):
        raise ConfigError(
            f"{path} does not exist: write at least the line `account: YOUR_ACCOUNT` into it, or "
            "name another file in ABF_SITE (docs/leonardo.md explains every key)"
        )
    settings = read_yaml(path) if path.exists() else {}
    if account:
        settings["account"] = account
    return validate(SiteConfig, settings, in_file(path) if path.exists() else str(path))
