"""The wheel: gin files travel with it and are found from any folder, and gin-config's own module stays visible."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From an archive of the tree, so that building leaves nothing behind in it.
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("t5x_ssm-*.whl"))


@pytest.mark.slow
def test_wheel_carries_the_gin_files_inside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in sorted((ROOT / "gin").rglob("*.gin")):
        assert f"t5x_ssm/gin/{path.relative_to(ROOT / 'gin')}" in names
    assert not [name for name in names if name.startswith(("gin/", "tests/", "benchmarks/"))]
    assert "tasks/cache.py" in names
    assert "launch/quickstart.sh" in names


@pytest.mark.slow
@pytest.mark.parametrize("gin_file", ["quickstart.gin", "models/gss_192m.gin"])
def test_installed_wheel_finds_its_gin_files_from_any_folder(wheel, tmp_path, gin_file):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import sys, t5x_ssm, gin; assert t5x_ssm.__file__.startswith(sys.argv[1]); gin.clear_config();"
        "from t5x_ssm import config, train; del sys.argv[1]; config.run_main(train.main)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(site), f"--gin_file={gin_file}"],
        cwd=elsewhere,
        env={"PYTHONPATH": str(site), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    # The file was found and read: what is missing is what only the user knows.
    assert done.returncode != 0
    assert "MODEL_DIR" in done.stderr.splitlines()[-1]
    assert "must be set" in done.stderr.splitlines()[-1]
