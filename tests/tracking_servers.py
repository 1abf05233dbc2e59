"""Real servers for the tracker's tests: `mlflow server` on SQLite, and PostgreSQL.

Each has a folder and a port of its own and runs as root or as any user. (The worker of an MLflow server outlives a test
run that is killed with -9.)
"""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

from slurm_cluster import free_ports, wait_for


class MlflowServer:
    """`mlflow server` on SQLite; a killed one can be started again on the same store."""

    def __init__(self, folder: Path) -> None:
        self._folder, (self._port,) = folder, free_ports(1)
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self._folder}/mlflow.db", self._folder / "artifacts"
        address = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        stores = ["--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "mlflow", "server", *address, *stores]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        wait_for(self._is_healthy, 600, lambda: (self._folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """End the server and its workers at once."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False


def postgres_programs() -> Path | None:
    """Folder of PostgreSQL's programs; Debian keeps them outside PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class PostgresServer:
    """PostgreSQL with one superuser and no password. It refuses to run as root, so root lends it to `postgres`."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs, (self._port,) = folder, programs, free_ports(1)
        self.uri = f"postgresql://vlaexp@127.0.0.1:{self._port}/postgres"
        self._lend = ["setpriv", "--pdeathsig", "QUIT"]
        if os.geteuid() == 0:
            self._lend += ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
            shutil.chown(folder, "postgres")

    def start(self) -> None:
        data, log_file = self._folder / "data", self._folder / "postgres.log"
        initdb = [self._programs / "initdb", "-D", data, "-U", "vlaexp", "--auth=trust", "--no-sync"]
        subprocess.run([*self._lend, *initdb], check=True, capture_output=True, cwd=self._folder)
        options = ["-D", data, "-p", str(self._port), "-h", "127.0.0.1", "-k", self._folder, "-F"]
        with log_file.open("ab") as log:
            command = [*self._lend, self._programs / "postgres", *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        wait_for(lambda: b"ready to accept connections" in log_file.read_bytes(), 60, "PostgreSQL does not start")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)  # "fast": connections are dropped
        self._process.wait(30)
