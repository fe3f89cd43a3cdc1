"""Rules about the tree as a whole: who imports whom, what starts fast, who may print."""

import ast
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("quant", "convert", "ondevice")
MODULES = [path.relative_to(ROOT) for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
MODULES.append(Path("cli.py"))

MAY_IMPORT = {
    "quant": {"quant"},
    "convert": {"convert", "quant"},
    "ondevice.kernels": {"ondevice.kernels", "quant"},
    "ondevice.demo": {"ondevice.demo", "convert", "quant"},
    "ondevice": {"ondevice", "ondevice.kernels", "ondevice.demo", "quant"},
    "cli": {"cli", "convert", "ondevice", "ondevice.demo", "quant"},
}
"""Package -> the packages of this repository it may import; the longest matching name counts."""

MAY_COMPILE = ("quant.", "ondevice.kernels.")
MAY_WRITE = {Path("cli.py"), Path("ondevice/console.py"), Path("ondevice/terminal.py")}
HELP_SECONDS = 1.0
"""The aim is 0.3; a busy machine gets room, an import of Numba (0.35 s when idle) rarely hides."""


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str | None:
    """The longest name in MAY_IMPORT that holds `module`; None for other people's packages."""
    return max((p for p in MAY_IMPORT if f"{module}.".startswith(f"{p}.")), key=len, default=None)


def imports_of(source: str) -> Iterator[str]:
    """Every module named in an import, `from package import module` as package.module too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(path: Path, source: str) -> list[str]:
    here = package_of(dotted(path))
    assert here is not None
    return [
        f"{path} imports {name}"
        for name in imports_of(source)
        if package_of(name) not in {None, *MAY_IMPORT[here]}
    ]


def test_imports_point_one_way() -> None:
    assert [line for path in MODULES for line in forbidden(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("quant/q4_k.py", "from ondevice import weights"),
        ("convert/write.py", "import ondevice.gguf_file"),
        ("ondevice/weights.py", "from convert import names"),
        ("ondevice/kernels/norm.py", "def f():\n    from ondevice.config import Config"),
        ("ondevice/demo/__init__.py", "from ondevice.model import Model"),
    ],
)
def test_the_rule_on_imports_catches(path: str, source: str) -> None:
    assert forbidden(Path(path), source) != []


def test_only_kernels_and_quantizers_use_numba() -> None:
    users = {
        dotted(path)
        for path in MODULES
        for name in imports_of((ROOT / path).read_text())
        if name.split(".")[0] in {"numba", "llvmlite"}
    }
    assert [name for name in users if not name.startswith(MAY_COMPILE)] == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stderr))
    heavy = {"numpy", "numba", "llvmlite", "gguf", "tokenizers", "jinja2", "prompt_toolkit"}
    assert loaded & heavy == set()
    assert "Commands:" in done.stdout


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < HELP_SECONDS


def test_only_the_command_line_writes_to_the_terminal() -> None:
    writers = {
        path
        for path in MODULES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.stdout", "sys.stderr"})
    }
    assert writers - MAY_WRITE == set()


def test_every_kernel_has_a_test() -> None:
    tested = {
        name for path in (ROOT / "tests").rglob("*.py") for name in imports_of(path.read_text())
    }
    kernels = [dotted(path) for path in MODULES if path.parts[:2] == ("ondevice", "kernels")]
    untested = [
        name for name in kernels if not any(f"{used}.".startswith(f"{name}.") for used in tested)
    ]
    assert untested == []


def test_every_command_and_option_has_help() -> None:
    """Every command has a help text of its own and no option without one."""
    import click

    import cli

    for name, command in cli.main.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), (
                f"{name} {parameter.name}"
            )
