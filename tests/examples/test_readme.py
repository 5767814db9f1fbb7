"""The page that maps tasks and arguments to files."""

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all((EXAMPLES / link).exists() for link in links)


def test_it_names_every_command_and_the_file_of_every_argument():
    commands = {path.name for path in EXAMPLES.glob("*.py")}
    assert commands <= set(re.findall(r"\]\((\w+\.py)\)", README))
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `--")]
    named = {name for arguments in rows for name in re.findall(r"`(--\w+)`", arguments)}
    sources = [path.read_text(encoding="utf-8") for path in EXAMPLES.rglob("*.py")]
    assert named == {name for source in sources for name in re.findall(r'add_argument\(\s*"(--\w+)"', source)}


def test_no_room_is_large():
    for path in EXAMPLES.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path
