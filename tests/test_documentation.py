"""The documentation builds without a warning, and its commands, files and messages are those of the code."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for folder in ("t5x_ssm", "tasks", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
# Flags that these programs hand on, and those of T5X itself.
FOREIGN = (
    "t5x.",
    "mkdocs",
    "t5x_ssm.integrations.t5x",
    "venv",
    "pip",
    "launch.local",
    "launch.gke",
    "launch.slurm",
    "launch.tpu_vm",
)


def commands():
    """(page, module, the rest of the command) for every `python -m …` of the documentation."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for module, rest in re.findall(r"python -m ([\w.]+\w)([^\n`]*)", text):
            yield page.name, module, rest


def module_file(module: str) -> pathlib.Path | None:
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.exists()), None)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            "docs/site/mkdocs.yml",
            "-d",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The reference is made from the docstrings.
    assert "Woodbury" in (tmp_path / "site/api/ssm/index.html").read_text()


def test_every_page_is_in_the_site():
    listed = set(re.findall(r": ([\w/]+\.md)", (ROOT / "docs/site/mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}


def test_commands_name_programs_and_flags_that_exist():
    found = list(commands())
    assert len(found) > 20
    for page, module, rest in found:
        if module.startswith(FOREIGN[0]) or module in FOREIGN:
            continue
        path = module_file(module)
        assert path, f"{page}: python -m {module}"
        source = (
            path.read_text()
            + (ROOT / "t5x_ssm/config.py").read_text()
            + (ROOT / "t5x_ssm/parallel/processes.py").read_text()
        )
        for flag in re.findall(r"(--[a-z]\w*)(?![\w.])", rest):
            assert f'"{flag}"' in source, f"{page}: python -m {module} {flag}"


def test_gin_files_and_scripts_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"--gin_file=([\w/]+\.gin)", page.read_text()):
            assert (ROOT / "gin" / name).exists(), f"{page.name}: {name}"
        for name in re.findall(r"bash ([\w./]+\.sh)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_messages_that_are_explained_are_the_codes_own():
    # Strings of the code that go on in the next line are one.
    code = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(path.read_text() for path in SOURCES))
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)[2:]
    assert len(rows) > 8
    for row in rows:
        for part in re.split(r"…|\(.*\)", row):
            assert part.strip(" .") in code, f"{row}: {part!r}"
