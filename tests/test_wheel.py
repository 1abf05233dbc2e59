"""What `pip install` gives a user who has no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_configuration_and_weights_and_works_from_anywhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert shipped
    assert all((installed / "vlaexp" / name).is_file() for name in shipped)
    assert (installed / "vlaexp" / "model" / "tiny_weights" / "base.safetensors").is_file()
    assert list((installed / "vlaexp" / "report").glob("*.j2"))
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import vlaexp; "
        "from vlaexp.config import compose; from vlaexp.paths import config_dir; "
        "print(vlaexp.__file__, config_dir(), compose('train').head._target_)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    package, conf, head = done.stdout.split()
    assert package.startswith(str(installed))
    assert conf.startswith(str(installed))
    assert head == "vlaexp.head.ee_delta.EEDeltaHead"
