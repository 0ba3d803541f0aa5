"""What a user installs: the wheel holds configs and weights, the lock names no index, the Makefile explains itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of what git would carry."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "train_state.pt", "*.part", ".*")
    for name in ("dqbench", "hydra_plugins", "conf", "sweeps"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_all_that_a_run_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for top in ("conf", "sweeps") for path in (ROOT / top).rglob("*.yaml")]
    assert {f"dqbench/{path.relative_to(ROOT)}" for path in data} <= names and len(data) > 20
    weights = [path for path in (ROOT / "dqbench" / "zoo").rglob("*") if path.suffix in (".safetensors", ".json")]
    assert {str(path.relative_to(ROOT)) for path in weights} <= names and weights
    assert {name.split("/")[0] for name in names} == {
        "dqbench",
        "hydra_plugins",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert not any(name.endswith((".pt", ".pyc")) for name in names)


def test_installed_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from dqbench.config import compose, data_root; print(data_root()); print(compose(['bits=w8a8']).bits.weight)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "dqbench"), "8"], done.stderr


def test_installed_wheel_brings_its_launchers(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; from hydra.core.plugins import Plugins; from hydra.plugins.launcher import Launcher;"
        "print(*[plugin.__module__ for plugin in Plugins.instance().discover(Launcher)]);"
        "assert 'torch' not in sys.modules"
    )
    alone = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, env=alone)
    assert {f"hydra_plugins.{file.stem}" for file in (ROOT / "hydra_plugins").glob("*.py")} <= set(done.stdout.split())
    assert done.returncode == 0 and not (ROOT / "hydra_plugins" / "__init__.py").exists(), done.stderr


def test_lock_pins_every_requirement_and_names_no_index() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert not [line for line in lines if re.search(r"://|^\s*-|@", line)]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    locked = {canonicalize_name(pin.name): pin for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        pin = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True), line


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_makefile_lists_its_targets_and_refuses_an_old_python(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()

    def make(*arguments: str) -> subprocess.CompletedProcess:
        alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        return subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, env=alone)

    listed = {line.split()[1] for line in make().stdout.splitlines()}
    assert listed == {"help", "install", "run", "test", "check", "smoke", "bench", "tables", "clean"}
    refused = make("install", "PYTHON=false")  # stands for an interpreter whose version check fails
    assert refused.returncode != 0 and "needs Python 3.11 or newer (false found)" in refused.stderr
    assert not (tmp_path / ".venv").exists()
