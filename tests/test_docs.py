"""The documentation agrees with the code: links, paths, names, Python snippets and shell commands."""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from functools import cache
from operator import attrgetter
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import yaml

import cli
from t2v import TextToVideo
from t2v.text import MiniLMTextEncoder
from t2v.transformer.config import TextConfig
from t2v.video import write_mp4
from t2v.vqvae.quantizer import FSQuantizer
from tests.support.documents import DOCUMENTS, ROOT, anchors, blocks, document_id, prose, shell_commands
from tests.support.toys import toy_transformer, toy_vqvae

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)


def test_commands_are_found():
    assert len(shell_commands("cli.py")) > 20
    assert len(shell_commands("-m")) > 20
    assert len(shell_commands("make")) > 3


@each_document
def test_relative_links_and_their_anchors_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target} is no heading"


@each_document
def test_files_that_are_mentioned_exist(path):
    mentioned = re.findall(r"(?<![\w./-])(?:callbacks|configs|data|docs|t2v|tests)/[\w./-]*\.\w+", path.read_text())
    missing = [name for name in mentioned if not (ROOT / name).exists()]
    assert not missing


@each_document
def test_names_that_are_mentioned_exist(path):
    text = path.read_text()
    names = re.findall(r"(?<![\w./-])(?:(?:t2v|callbacks)(?:\.[A-Za-z_]\w*)+|data\.[A-Z]\w*)", text)
    names += re.findall(r"(?:class_path|:::):? ((?:t2v|data|callbacks)[\w.]*)", text)
    for name in names:
        resolve_name(name)


@pytest.fixture(scope="module")
def source() -> str:
    """The text of all code and configs."""
    folders = ("t2v", "data", "callbacks", "configs", "tests/benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    return "\n".join(path.read_text() for path in [*paths, ROOT / "cli.py", ROOT / "demo.py", ROOT / "pyproject.toml"])


@each_document
def test_identifiers_in_code_font_occur_in_the_code(path, source):
    inline = [text for text in re.findall(r"`([^`\n]+)`", prose(path)) if "/" not in text]
    identifiers = [word for text in inline for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b|\b\w+\.jsonl\b", text)]
    composed = {"frechet_mobilenet"}  # "frechet_" and the network's name
    assert [name for name in identifiers if name not in source and name not in composed] == []


def test_the_tree_in_the_readme_lists_what_exists():
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("cli.py"))
    folder, listed = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        listed.add(folder + name if line.startswith(" ") else name)
    assert [name for name in sorted(listed) if not (ROOT / name).exists()] == []
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("t2v/*/__init__.py")}
    assert packages <= listed


@each_document
def test_python_blocks_use_names_that_exist(path):
    for block in blocks(path, "python"):
        tree, imported = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {alias.name: resolve_name(f"{node.module}:{alias.name}") for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", name := ast.unparse(node)):
                root, _, attributes = name.partition(".")
                if root in imported:
                    attrgetter(attributes)(imported[root])


@pytest.fixture(scope="module")
def toy_model() -> TextToVideo:
    layers = {"spatial_layers": 1, "temporal_layers": 1}
    transformer = toy_transformer(text=TextConfig(384), vocab_size=16, **layers)
    vqvae = toy_vqvae(FSQuantizer(levels=[4, 4]), channel_multipliers=(1, 1)).eval()
    return TextToVideo(transformer, vqvae, MiniLMTextEncoder(), fps=8.0, frames=5)


@pytest.mark.parametrize("name", ["README.md", "docs/how-to/generate.md"])
def test_python_blocks_run_on_an_exported_model(name, toy_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_model.save_pretrained("model")
    start = tmp_path / "runs/demo/clips/val/000000.mp4"
    start.parent.mkdir(parents=True)
    write_mp4(start, torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), fps=8)
    scope: dict[str, object] = {}
    with torch.compiler.set_stance("force_eager"):
        for block in blocks(ROOT / name, "python"):
            exec(compile(block, name, "exec"), scope)
    assert scope["videos"].shape[2:] == (3, 16, 16)  # type: ignore[attr-defined]
    assert (tmp_path / "circle.mp4").stat().st_size > 0


class _ParserBuiltError(Exception):
    pass


class _ParserOnly(cli.T2VCLI):
    """The command line, up to the parser."""

    def parse_arguments(self, parser, args):
        raise _ParserBuiltError(parser)


@pytest.fixture(scope="module")
def parser():
    with pytest.raises(_ParserBuiltError) as built:
        _ParserOnly([])  # with a command, only its parser is built
    return built.value.args[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the configs, the YAML blocks that begin with a file name, and the configs of runs."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    for run, config in (("demo/transformer", "transformer/shapes.yaml"), ("moved", "vqvae/shapes.yaml")):
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "runs" / run / "config.yaml").symlink_to(ROOT / "configs" / config)
    for block in (block for path in DOCUMENTS for block in blocks(path, "yaml")):
        if name := re.match(r"# ([\w-]+\.yaml)\n", block):
            (folder / name[1]).write_text(block)
    return folder


IN_README = shell_commands("cli.py", [ROOT / "README.md"])


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=() if command in IN_README else pytest.mark.slow)
        for command in sorted(shell_commands("cli.py"))
    ],
)
def test_cli_commands_parse(command, parser, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    words = shlex.split(command)
    parser.parse_args(words[words.index("cli.py") + 1 :])


@each_document
def test_yaml_blocks_are_yaml(path):
    for block in blocks(path, "yaml"):
        assert yaml.safe_load(block)


@cache
def _help(module: str, *subcommand: str) -> str:
    """Return the help of a module's command, which is run in this process."""
    output, argv = io.StringIO(), sys.argv
    sys.argv = [module, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
    assert not end.value.code, f"{module} --help fails"
    return output.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("command", sorted(shell_commands("-m")))
def test_module_commands_have_their_flags(command):
    words = shlex.split(command)
    module, *arguments = words[words.index("-m") + 1 :]
    text = _help(module, arguments[0]) if module == "t2v" else _help(module)
    for flag in (word.split("=")[0] for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{module} has no {flag}"


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    known |= {f"DATA={name}" for name in re.findall(r"^CLIPS_(\w+) :=", makefile, re.MULTILINE)}
    assert {word for command in shell_commands("make") for word in command.split()[1:]} <= known
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    groups = [group for path in DOCUMENTS for group in re.findall(r'-e "\.\[([\w,]+)\]"', path.read_text())]
    assert len(groups) > 5
    assert {name for group in groups for name in group.split(",")} <= set(extras)
