"""What the README and docs/ say holds: Python blocks run, links lead somewhere, make verbs exist."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_TEST = "<!-- no-test -->"


class Block(NamedTuple):
    """A fenced block: its language, the line of its first content, its content, and whether it may be run."""

    language: str
    line: int
    source: str
    runs: bool


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order. One that stands under NO_TEST is not to be run."""
    blocks = []
    fence, language, start, before = "", "", 0, ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        stripped = line.strip()
        if not fence and (opening := re.match(r"(`{3,}|~{3,})\s*([\w+-]*)", stripped)):
            fence, language, start = opening[1], opening[2], number + 1
        elif fence and stripped == fence:
            source = "\n".join(lines[start:number]) + "\n"
            blocks.append(Block(language, start + 1, source, before != NO_TEST))
            fence, before = "", ""
        elif not fence and stripped:
            before = stripped
    return blocks


def without_blocks(text: str) -> str:
    return re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def local_links(text: str) -> list[str]:
    """The targets of links and images that are files of the repository, as they are written."""
    prose = re.sub(r"`[^`\n]*`", "``", without_blocks(text))
    targets = re.findall(r"\]\(<?([^)\s>]+)[^)]*\)", prose)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", prose, flags=re.MULTILINE)
    targets += re.findall(r"""\b(?:src|href)=["']([^"']+)["']""", prose)
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#", target)]


def make_verbs(text: str) -> set[str]:
    """The make verbs in command lines and inline code; `make` in prose is a word of English."""
    commands = [line for block in fenced_blocks(text) for line in block.source.splitlines()]
    commands += re.findall(r"`([^`\n]+)`", without_blocks(text))
    pattern = re.compile(r"(?:^|[$;&|])\s*make\s+([a-z][\w-]*)")
    return {verb for command in commands for verb in pattern.findall(command)}


def makefile_targets(text: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, flags=re.MULTILINE))


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_python_blocks_run(tmp_path: Path) -> None:
    for block in fenced_blocks((ROOT / "README.md").read_text()):
        if block.language != "python":
            continue
        where = f"README.md:{block.line}"
        # The empty lines make the line numbers of an error those of the README.
        compile("\n" * (block.line - 1) + block.source, "README.md", "exec")
        if not block.runs:
            continue
        result = subprocess.run(
            [sys.executable, "-c", block.source],
            cwd=tmp_path,  # what a block writes does not stay in the repository
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, f"{where}: exit code {result.returncode}\n{result.stderr}"


def test_your_own_robot_is_trained(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "your_own_robot.md").read_text()
    files = re.findall(r"^```python file=(\S+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["make_model.py", "walk.py"]
    for name, source in files:
        (tmp_path / name).write_text(source)
    few = "--ppo.num-envs 8 --ppo.num-steps 4 --training.iterations 2 --training.no-video --training.run-dir run"
    for command in (["make_model.py"], ["walk.py", *few.split()]):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, f"{command[0]}: exit code {result.returncode}\n{result.stderr}"
    assert "2 of 2 iterations" in result.stdout and (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    missing = []
    for target in local_links(path.read_text()):
        file = unquote(target.split("#")[0])
        base = ROOT if file.startswith("/") else path.parent
        if not (base / file.lstrip("/")).exists():
            missing.append(target)
    assert not missing, f"{path.relative_to(ROOT)} links to what is not there: {missing}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_make_verbs_exist(path: Path) -> None:
    unknown = make_verbs(path.read_text()) - makefile_targets((ROOT / "Makefile").read_text())
    assert not unknown, f"{path.relative_to(ROOT)} names verbs that the Makefile lacks: {sorted(unknown)}"


EXAMPLE = """\
# Title

See [the guide](docs/guide.md#first), ![a plot](docs/plot.png "title"), [the site](https://example.org),
[below](#title), and [the notes][notes]; make sure `a[0](b)` is no link. Run `make check`.

<img src="docs/video.gif">

[notes]: docs/notes.md

```python
answer = 42
```

<!-- no-test -->
```python
train_for_days()
```

```sh
make setup   # once
$ make demo ARGS=--help
cd elsewhere && make bench
```
"""


def test_the_parts_of_a_document_are_found() -> None:
    assert fenced_blocks(EXAMPLE)[:2] == [
        Block("python", 11, "answer = 42\n", True),
        Block("python", 16, "train_for_days()\n", False),
    ]
    assert local_links(EXAMPLE) == ["docs/guide.md#first", "docs/plot.png", "docs/notes.md", "docs/video.gif"]
    assert make_verbs(EXAMPLE) == {"check", "setup", "demo", "bench"}
    assert makefile_targets("RUN := a\nb: c\n\td\nlong-name:\n.PHONY: e\n") == {"b", "long-name"}
