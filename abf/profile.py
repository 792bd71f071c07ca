"""What `snakemake --profile leonardo` finds by itself: this checkout's profile, its Snakefile."""

from __future__ import annotations

from pathlib import Path

from abf.errors import ConfigError

SNAKEFILES = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")
"""Where Snakemake looks when no file is named."""


def link_profile(name: str, profiles: Path, config_home: Path) -> str:
    """Link `config_home`/snakemake/`name` to `profiles`/`name`; say what was done.

    Snakemake looks there and never in ./profiles. An identical link is kept.

    Raises:
        ConfigError: there is no such profile, or something else has the name.
    """
    target = (profiles / name).resolve()
    if not (target / "config.yaml").is_file():
        known = ", ".join(sorted(p.parent.name for p in profiles.glob("*/config.yaml")))
        raise ConfigError(f"no profile {name!r} in {profiles}; there are: {known}")
    link = config_home / "snakemake" / name
    if link.is_symlink() and link.readlink() == target:
        return f"{link} already points to {target}"
    if link.is_symlink() or link.exists():
        what = f"a link to {link.readlink()}" if link.is_symlink() else "a file or folder"
        raise ConfigError(
            f"{link} is {what}, not this checkout's profile; it was left alone. Remove it, or use "
            f"--profile {target}"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return f"{link} now points to {target}"


def require_snakefile(folder: Path) -> Path:
    """The Snakefile that Snakemake would take when it is started in a folder.

    Raises:
        ConfigError: there is none; says where to go.
    """
    for name in SNAKEFILES:
        if (folder / name).is_file():
            return folder / name
    ours = Path(__file__).parents[1]
    where = f"cd {ours}" if (ours / "workflow" / "Snakefile").is_file() else "cd into the checkout"
    raise ConfigError(
        f"{folder.absolute()} has no Snakefile (looked for {', '.join(SNAKEFILES)}): {where}, and "
        "run the same command there"
    )
