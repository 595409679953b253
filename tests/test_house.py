"""The house as design has it: which way imports run, what stands where, how long things are, and
that what is written about it is so.

The graph of imports is drawn from the source, imports inside functions included. A program that
starts another of ours ("train.py" as a word of a command, or "-m", "bench") imports it as well.
"""
import ast
import importlib.util
import re
import runpy
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from core.common import ROOT

SEVEN = ("ccra.py", "clip.py", "data.py", "eval.py", "llama.py", "sample.py", "train.py")
STAGES = (("core",), ("clip",), ("llama", "data"), ("fusers",), ("ccra",),
          ("fast", "training", "toy", "benchmarks"), ("train", "eval", "viz"),
          ("sample", "study", "bench"), ("tests",))
ROOMS = ("core", "fast", "fusers", "training", "benchmarks", "toy", "study", "viz", "bench",
         "tests", "docs", "assets")
# `python data.py prepare`: what it makes is data, so one looks for it there
EXCEPTION = ("data", "training.prepare", "main")


def tracked() -> list[str]:
    """The repository's files as git has them, new ones that it doesn't ignore among them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def files():
    return tracked()


@pytest.fixture(scope="module")
def sources(files):
    """{path: syntax tree} of all our Python."""
    return {name: ast.parse((ROOT / name).read_text(encoding="utf-8"), name)
            for name in files if name.endswith(".py")}


# --------------------------------------------------------------------------------------------------
# Imports

def module_of(path: str) -> str:
    """training/plan.py -> training.plan; fast/__init__.py -> fast."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


class Arrows(ast.NodeVisitor):
    """What a module imports or starts: (name of one of our modules, in which function, line)."""

    def __init__(self, modules: set[str]):
        self.modules, self.inside, self.found = modules, "", []

    def arrow(self, name: str, node: ast.AST) -> bool:
        """Note it if it's ours. A package that is started is its __main__."""
        if name in self.modules:
            self.found.append((name, self.inside, node.lineno))
        return name in self.modules

    def visit_FunctionDef(self, node):
        outer, self.inside = self.inside, self.inside or node.name
        self.generic_visit(node)
        self.inside = outer

    def visit_Import(self, node):
        for alias in node.names:
            self.arrow(alias.name, node)

    def visit_ImportFrom(self, node):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        for alias in node.names:
            if not self.arrow(f"{node.module}.{alias.name}", node):
                self.arrow(node.module, node)

    def words(self, node):
        """The words of a command, in a list or as arguments: "-m", "bench"."""
        words = node.args if isinstance(node, ast.Call) else node.elts
        said = [word.value if isinstance(word, ast.Constant) else None for word in words]
        for flag, name in zip(said, said[1:]):
            if flag == "-m" and isinstance(name, str):
                self.arrow(f"{name}.__main__", node) or self.arrow(name, node)
        self.generic_visit(node)

    visit_Call = visit_List = visit_Tuple = words

    def visit_keyword(self, node):
        if node.arg != "prog":                       # of an argparse: the program's own name
            self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value.endswith(".py"):
            self.arrow(module_of(node.value), node)


@pytest.fixture(scope="module")
def arrows(sources):
    """{module: [(module it needs, in which of its functions, line)]}."""
    modules = {module_of(path) for path in sources}
    graph = {}
    for path, tree in sources.items():
        visitor = Arrows(modules)
        visitor.visit(tree)
        graph[module_of(path)] = visitor.found
    return graph


def stage(module: str) -> int:
    """How far right a module stands. A room that isn't in STAGES has no place."""
    room = module.partition(".")[0]
    found = [i for i, rooms in enumerate(STAGES) if room in rooms]
    assert found, f"{module}: where does it belong?"
    return found[0]


def test_the_graph_sees_what_there_is_to_see():
    """Imports at the top, inside functions, of modules from packages; programs that are started."""
    visitor = Arrows({"core", "core.common", "toy.world", "train", "bench.__main__", "study.runs"})
    visitor.visit(ast.parse("from core import common, nothing\n"
                            "import toy.world as toy\n"
                            "def f():\n"
                            "    def g():\n"
                            "        from study.runs import run\n"
                            "    subprocess.run([x, str(ROOT / 'train.py'), '--out'])\n"
                            "    return [x, '-m', 'bench', '--child'], 'not train.py'\n"))
    assert visitor.found == [("core.common", "", 1), ("core", "", 1), ("toy.world", "", 2),
                             ("study.runs", "f", 5), ("train", "f", 6), ("bench.__main__", "f", 7)]


def test_imports_run_one_way(arrows):
    wrong = [f"{module}:{line} -> {needed}" for module, found in arrows.items()
             for needed, inside, line in found
             if stage(needed) > stage(module) and (module, needed, inside) != EXCEPTION]
    assert not wrong, "from right to left: " + ", ".join(wrong)
    assert any(needed == EXCEPTION[1] for needed, *_ in arrows["data"])


def test_imports_go_in_no_circle(arrows):
    """Neither between files nor, apart from a package and what is in it, between rooms."""
    graph = {module: {needed for needed, inside, _ in found
                      if needed != module and (module, needed, inside) != EXCEPTION}
             for module, found in arrows.items()}
    rooms = {}
    for module, needed in graph.items():
        room = module.partition(".")[0]
        others = {name.partition(".")[0] for name in needed} - {room}
        rooms[room] = rooms.get(room, set()) | others
    for which in (graph, rooms):
        try:
            TopologicalSorter(which).prepare()
        except CycleError as e:
            pytest.fail("a circle of imports: " + " <- ".join(e.args[1]))


def test_no_change_of_paths(sources):
    """Everything runs from the root as it is; nothing is imported from a conftest."""
    for path, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "path":
                owner = node.value
                assert not (isinstance(owner, ast.Name) and owner.id == "sys"), f"{path}: sys.path"
            if isinstance(node, ast.ImportFrom):
                assert "conftest" not in node.module, f"{path}:{node.lineno}: from conftest"


# --------------------------------------------------------------------------------------------------
# What stands where, and how long it is

def test_the_root_shows_the_seven_and_rooms(files):
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(SEVEN)
    assert {name.partition("/")[0] for name in files if "/" in name} == {*ROOMS, ".ci"}


def test_tests_mirror_the_tree(files):
    """tests/ROOM for a room, tests/NAME or tests/test_NAME.py for one of the seven."""
    stems = {name.removesuffix(".py") for name in SEVEN}
    for name in files:
        parts = name.split("/")
        if parts[0] == "tests" and len(parts) > 2 and parts[1] not in ("without_torch", "attack"):
            assert parts[1] in stems | set(ROOMS), name


def test_lines_functions_and_files_are_short(sources):
    """Lines to 100 columns, functions under 50 lines, the seven to 500 lines, others to 450."""
    long = []
    for path, tree in sources.items():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        most = 500 if path in SEVEN else 450
        if len(lines) > most:
            long.append(f"{path}: {len(lines)} lines")
        long += [f"{path}:{i}: {len(line)} columns"
                 for i, line in enumerate(lines, 1) if len(line) > 100]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if (length := node.end_lineno - node.lineno + 1) >= 50:
                    long.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_ruff_is_content():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff isn't installed (pip install -r requirements-test.txt)")
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


# --------------------------------------------------------------------------------------------------
# What is written about it

# Files that stood in the root or in tests/ before there were rooms. (Others' projects have files of
# many names; these are not to be named but with the room in which they stand now.)
BEFORE = {"answers", "baselines", "bench", "benchmarks", "curve", "errors", "findings", "formats",
          "linear", "look", "metrics", "parallel", "plan", "prepare", "probes", "replay", "scores",
          "study", "submit", "tables", "towers", "toy", "viz", "weights",
          "big", "card", "decode", "make_llava", "peak"}
NAMED = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*)([\w-]+)\.py\b")
GONE = re.compile(r"NANOCCRA_(?:BIG|KILLS|GPU)\b")
TEXTS = (".py", ".md", ".sh", ".html", ".toml", ".txt", ".cff", ".ci/run")


def names_nothing(text: str, files: list[str]) -> list[str]:
    """What a text names that isn't there any more: files by themselves, by a room, or as tests."""
    found = GONE.findall(text)
    for match in NAMED.finditer(text):
        folder, stem = match.groups()
        ours = folder.partition("/")[0] in ROOMS or stem.startswith("test_") or stem in BEFORE
        if ours and match[0] not in files:
            found.append(match[0])
    return found


def test_what_names_nothing():
    """The rule itself."""
    files = ["training/prepare.py", "toy/towers.py", "tests/data/test_sets.py"]
    here = "training/prepare.py, toy/towers.py; python data.py prepare; LLaVA's llava/eval/pope.py"
    assert names_nothing(here, files) == []
    gone = ["prepare.py", "toy.py", "tests/card.py", "test_sets.py", "toy/scenes.py"]
    for name in gone:
        assert names_nothing(f"(see `{name}`)", files) == [name]
    assert names_nothing("NANOCCRA_GPU=1 pytest", files) == ["NANOCCRA_GPU"]


def block() -> list[str]:
    """The lines of README's tree: what stands between fences under "## The house"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("## The house")[2].partition("```\n")[2].partition("```")[0].splitlines()


def tree() -> list[str]:
    """Its paths. Lines are names, two spaces or more, what they are; names are parted by commas
    and stand two columns right of the folder they are in."""
    paths, folders = [], []                          # folders: those that the line stands in
    for line in filter(str.strip, block()):
        names = line.lstrip(" ")
        if (depth := (len(line) - len(names)) // 2) > 1:
            continue                                 # a note goes on
        for name in re.split(r"\s{2,}", names)[0].split(", "):
            folders[depth:] = [name.rstrip("/")]
            paths.append("/".join(folders) + "/" * name.endswith("/"))
    return paths


def test_nothing_is_named_that_is_gone(files):
    gone, listed = [], set(block())                  # in the tree names stand below their rooms
    for name in files:
        if name.endswith(TEXTS) and name != "tests/test_house.py":
            for i, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
                if line not in listed:
                    gone += [f"{name}:{i}: {word}" for word in names_nothing(line, files)]
    assert not gone, "\n".join(gone)


def test_the_readme_has_the_tree(files):
    """All that is listed is there. All that is there is listed, or lies in a folder that is listed
    alone; what is empty needs no line."""
    listed = tree()
    assert len(listed) == len(set(listed)) > 50
    folders = [path for path in listed if path.endswith("/")]
    closed = tuple(folder for folder in folders
                   if not any(path.startswith(folder) and path != folder for path in listed))
    there = {name for name in files if (ROOT / name).stat().st_size}
    ghosts = {path for path in listed if not path.endswith("/")} - there
    ghosts |= {folder for folder in folders if not any(name.startswith(folder) for name in there)}
    missing = {name for name in there - set(listed) if not name.startswith(closed)}
    assert not ghosts, f"README names what isn't there: {sorted(ghosts)}"
    assert not missing, f"not in README's tree: {sorted(missing)}"


def test_the_readme_says_where_things_are():
    """`ccra.py: smooth`, `CCRA.key`: what is named behind a file stands in that file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"`([\w/]+\.py): ([\w., ]+)`((?:, `[\w.]+`)*)", text)
    assert len(said) > 10
    for file, first, more in said:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", first + more):
            assert re.search(rf"\b(?:def|class) {name}\b|^{name}\b", source, re.M), (file, name)


def test_links_lead_somewhere(files):
    """Relative links and pictures of our pages."""
    for page in (name for name in files if name.endswith(".md")):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            if "://" not in target:
                assert (ROOT / Path(page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("program", [*SEVEN[2:4], *SEVEN[5:], "toy", "study", "viz", "bench",
                                     "bench.big", "bench.card", "bench.decode", "bench.make_llava",
                                     "bench.peak", "bench.lora", "bench.serve",
                                     "training.curve", "training.merge", "viz.shots"])
def test_every_program_says_what_it_is(program, monkeypatch, capsys):
    """-h of every program: in this process, where torch is loaded already."""
    monkeypatch.setattr(sys, "argv", [program, "-h"])
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    where = str(ROOT / program) if program.endswith(".py") else program
    try:
        run(where, run_name="__main__")
    except SystemExit as e:
        assert not e.code
    said = capsys.readouterr().out
    assert len(said) > 300 and "TODO" not in said
