"""Write docs/cli.md from the commands' own help; --check only says whether it is current."""

import sys
from pathlib import Path

import click

import cli
from ondevice import console

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
INTRODUCTION = f"""\
# Command reference

Written by `make docs` from the help texts; edit `cli.py` instead.

`MODEL` is a GGUF file, the first part of a split one, or `demo`. With `--json` stdout is one line,
a JSON object. Progress and notes go to stderr, and only when that is a terminal. Sizes are written
`512M` or `2G`.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | wrong usage: an option out of range, an output that exists |
| 3 | bad model, checkpoint or input file |
| 4 | the machine cannot: memory, disk, permissions |
| 5 | interrupted; running the same command again is safe |
| {console.CTRL_C} | Ctrl-C |
| {console.BUG} | a bug of ours; please report the traceback |
"""


def page() -> str:
    """The whole of docs/cli.md."""
    sections = [INTRODUCTION]
    parent = click.Context(
        cli.main, info_name="ondevice", terminal_width=100, max_content_width=100
    )
    for name, command in cli.main.commands.items():
        context = click.Context(
            command, info_name=name, parent=parent, terminal_width=100, max_content_width=100
        )
        sections.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif page() != PAGE.read_text(encoding="utf-8"):
        sys.exit("docs/cli.md is not what the commands say; run make docs")
