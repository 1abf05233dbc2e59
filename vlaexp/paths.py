"""Where the project's own files lie."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def config_dir() -> Path:
    """The folder of YAML groups: inside an installed wheel, or at the root of a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"
