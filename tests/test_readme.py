"""What the README tells a reader to type would work, and the files that it names are there. Nothing is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from braceexpand import braceexpand

from kd_accel import cli
from kd_accel.schema import ConfigError

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (REPO / "docs/architecture.md").read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages ("" for those without)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [body for language, body in found if language in languages]


def commands(text: str) -> list[str]:
    """Our command lines: of shell blocks, with continued lines joined, and `kd-accel ...` between backticks."""
    shell = "\n".join(blocks(text, "bash", "sh")).replace("\\\n", " ").splitlines()
    inline = [line for line in re.findall(r"`(kd-accel [^`\n]+)`", text) if "VERB" not in line]
    ours = re.compile(r"(\w+=\S* +)*(kd-accel |\S*/?(bash|sh) |\.ci/|accelerate launch |torchrun |python -m kd_accel)")
    return [line.strip() for line in [*shell, *inline] if ours.match(line.strip())]


def check(command: str) -> None:
    """Raise ConfigError or AssertionError when the command line would not start, as seen from the repository."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # VARIABLE=value before the command
        words = words[1:]
    match words:
        case ["kd-accel", *rest]:
            cli.parse(rest)
        case ["accelerate", "launch", *rest]:
            args = launch_command_parser().parse_args(rest)
            assert Path(args.config_file).is_file(), f"{args.config_file} does not exist"
            assert args.module, f"no -m in: {command}"
            assert args.training_script == "kd_accel", command
            cli.parse(args.training_script_args)
        case ["torchrun" | "python", *rest]:
            cli.parse(rest[rest.index("kd_accel") + 1 :])
        case ["bash" | "sh", script, *rest]:
            assert Path(script).is_file(), f"{script} does not exist"
            if script == "launch/demo.sh":
                cli.parse(["demo", *rest])
        case [script, *_]:
            assert Path(script).is_file(), f"{script} does not exist"


def tree_files(block: str) -> list[str]:
    """The paths in a file tree: names before the first wide gap, and after it those of files in the folder before it.

    Two spaces of indentation lead into a folder: the last one above that stands further left.
    """
    paths: list[str] = []
    folders: dict[int, str] = {}  # indentation -> folder
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = {i: folder for i, folder in folders.items() if i < indent}
        parent = "".join(folders[i] for i in sorted(folders))
        first, _, rest = line.strip().partition("  ")
        names = first.split()
        if names[-1].endswith("/"):
            folders[indent] = names[-1]
            names += [names[-1] + word for word in re.findall(r"[\w.{},*-]+\.(?:py|ya?ml|sh|toml|cfg|txt|md)\b", rest)]
        paths += [parent + path for name in names for path in braceexpand(name)]
    return paths


def missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not list(REPO.glob(path.rstrip("/")))]


def tree(text: str) -> str:
    """The block that shows the repository: the one with a line for kd_accel/."""
    found = [block for block in blocks(text, "", "text") if re.search(r"^kd_accel/", block, re.M)]
    assert len(found) == 1, "one block with the file tree is needed (a line that begins with kd_accel/)"
    return found[0]


def test_the_readme_shows_commands():
    """At least one of each way to start something."""
    found = commands(README)
    for start in ("kd-accel ", "accelerate launch ", "bash launch/"):
        assert any(command.startswith(start) for command in found), start


@pytest.mark.parametrize("command", commands(README))
def test_command_would_start(command, monkeypatch):
    """The verb exists, its config files exist and are valid, every key is known, launchers and scripts exist."""
    monkeypatch.chdir(REPO)
    check(command)


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=["README.md", "docs/architecture.md"])
def test_every_file_in_the_tree_exists(page):
    assert missing(tree_files(tree(page))) == []


def test_every_page_of_docs_is_linked():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README))
    assert {page.name for page in (REPO / "docs").glob("*.md")} == linked


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("kd-accel trian configs/demo.yaml", "unknown verb"),
        ("kd-accel train configs/nowhere.yaml", "no such file"),
        ("kd-accel train configs/demo.yaml optim.lrr=1  # a comment", "optim.lrr: unknown key"),
        ("A=1 kd-accel eval", "MODEL is missing"),
        ("accelerate launch --config_file launch/nowhere.yaml -m kd_accel train configs/demo.yaml", "does not exist"),
        ("accelerate launch --config_file launch/zero2.yaml -m kd_accel train configs/nowhere.yaml", "no such file"),
        ("accelerate launch --config_file launch/zero2.yaml kd_accel train configs/demo.yaml", "no -m in"),
        ("torchrun --nproc_per_node 2 -m kd_accel trian", "unknown verb"),
        ("bash launch/nowhere.sh", "does not exist"),
        ("bash launch/demo.sh out lr=3", "lr: unknown key"),
    ],
)
def test_a_command_that_would_not_start_is_found(command, expected, monkeypatch):
    """Also behind a comment, a variable, a line continuation or in a table."""
    monkeypatch.chdir(REPO)
    with pytest.raises((ConfigError, AssertionError), match=expected):
        check(command)


def test_commands_are_found_where_they_stand():
    text = "a `kd-accel demo` b `kd-accel VERB ...`\n"
    text += "```bash\nls\nX=1 kd-accel eval \\\n  a\nbash launch/test.sh # c\n```\n"
    assert commands(text) == ["X=1 kd-accel eval    a", "bash launch/test.sh # c", "kd-accel demo"]


def test_a_file_that_is_not_there_is_found():
    """In every place of a tree where a file can be named."""
    block = (
        "pyproject.toml gone.toml\n"
        "launch/        zero{1,9}.yaml  demo.sh\n"
        "kd_accel/\n"
        "  cli.py       the verbs\n"
        "  gone.py      was moved\n"
        "  losses/      contrastive.py gone.py\n"
        "    __init__.py\n"
        "tests/         gone.py"
    )
    assert missing(tree_files(block)) == [
        "gone.toml",
        "launch/zero9.yaml",
        "kd_accel/gone.py",
        "kd_accel/losses/gone.py",
        "tests/gone.py",
    ]
