"""README says only what is so: its commands run as written, its files, names and flags exist."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from video import Video

from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_first_command_runs_as_written_in_a_copy_of_the_repository(tmp_path):
    """All but the installation, which made this environment."""
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    setup, _, run = COMMANDS[0].rpartition("&& python ")
    assert setup.split() == "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt".split()
    done = subprocess.run([sys.executable, *run.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "toy.safetensors: stage 2" in done.stdout
    result, side = (Video(tmp_path / name) for name in ("ref_drive.mp4", "ref_drive_compare.mp4"))
    assert result.frames == side.frames == Video(ROOT / "assets/drive.mp4").frames


def test_ci_runs_what_readme_says():
    """.ci/run installs and tests with README's own command."""
    script = (ROOT / ".ci/run").read_text()
    setup = next(command for command in COMMANDS if command.endswith("&& pytest"))
    for part in setup.split("&&"):
        words = part.replace(". .venv", "source .venv").split()
        assert all(word in script for word in words), part


INLINE = re.findall(r"`(\w+\.py [^`]+)`", README.replace("\n", " "))
SCRIPTS = {re.search(r"\w+\.py.*", command)[0] for command in COMMANDS + INLINE if ".py" in command}


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_every_command_in_readme_is_understood(command):
    """By the script's own parser, where it has one to call, else by the names of its flags. Catches a renamed option."""
    script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    if hasattr(module, "parse_args"):
        module.parse_args(words)
        return
    sub = [word for word in words[:1] if re.fullmatch(r"[a-z][a-z-]*", word)]
    text = subprocess.run([sys.executable, script, *sub, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for flag in (word.split("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"(^|[\s,\[]){re.escape(flag)}\b", text), f"{flag} is not in {script} --help"


def test_python_in_readme_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_training_block_runs_in_a_copy_of_the_repository(tmp_path):
    """As written, but for the sizes."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
    small = {"data.py": "--clips 6 --held-out 4", "train.py": "--steps 2", "judge.py": "--pairs 1 --seeds 1 --steps 2"}
    (block,) = [block for block in BLOCKS if block.startswith("python data.py toy")]
    for line in block.splitlines():
        python, script, *words = line.split("#")[0].split()
        command = [sys.executable, script, *words, *small[script].split()]
        done = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "| seed 0 |" in done.stdout


def test_files_named_in_readme_exist():
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", README) + re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_names_in_readme_exist():
    """`module.Name` in the tables is a real attribute."""
    for module, name in re.findall(r"`(model|diffusion|align|cues|data|train|vae)\.(\w+)`", README):
        if name != "py":
            text = (ROOT / f"{module}.py").read_text()
            assert re.search(rf"^(class|def) {name}\b|^{name} =", text, flags=re.M), f"{module}.{name}"


def test_the_generated_parts_are_those_of_this_code():
    """Shapes of a batch, lengths of files, places of equations and tests: python tour.py --write makes them."""
    import tour

    assert tour.refreshed(README) == README, "run: python tour.py --write"


def test_the_memory_table_is_what_budget_prints():
    printed = subprocess.run([sys.executable, "budget.py"], cwd=ROOT, capture_output=True, text=True).stdout
    assert printed[printed.index("| GPUs") :].strip() in README, "copy the table of: python budget.py"
