"""The house: imports run one way, and nothing goes in a circle. Read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up. A module imports what is on its own floor or below.
GROUND = {"flowers", "flowers.files", "flowers.devices", "flowers.matfile"}
SAMPLE = "flowers.sample"  # stands on the ground: it draws pictures and knows nothing of the index
WINGS = ("flowers.study", "flowers.qwen", "flowers.gallery")
PAGE = "flowers.page"  # what web.py puts together: it shows what several wings make
SCRIPTS = 5  # the uppermost floor
SCRIPT_FOLDERS = (".", "data_Exploration", "benchmarks")

# What exploration, the report, a grid and the page's first view must not wait for.
SLOW = {"torch", "torchvision", "clip"}
QUICK = (
    "flowers.data",
    "flowers.images",
    "flowers.colour",
    "flowers.cache",
    "flowers.files",
    "flowers.figures",
    "flowers.sample",
    "flowers.choices",
    "flowers.runs",
    "flowers.settings",
    "flowers.qwen_settings",
    "web",
    "ablate",
    "report",
    "data_Exploration.dataset_Description",
    "data_Exploration.class_distribution",
    "data_Exploration.isomap",
)

# Scripts that read their flags before they import anything of this, and a mistake in them: one that
# argparse finds, or one of flags that contradict each other.
AFTER_FLAGS = SLOW | {"cv2", "matplotlib", "pandas", "scipy", "seaborn", "sklearn", "statsmodels"}
AFTER_FLAGS |= {"transformers", "peft"}
MISTAKES = {
    "train.py": ("--eval_every", "1"),
    "baseline_eval.py": ("--calibrated", "--wise_ft", "0"),
    "predict.py": ("rose.jpg", "--top", "0"),
    "test_models.py": ("--sort", "images_per_s"),
    "qwen_eval.py": ("--list_order", "drawn"),
    "qwen_train.py": ("--eval_every", "1"),
    "qwen_probe.py": ("--val_shots", "1"),
    "ablate.py": ("temperature", "--no_such_flag_of_train"),
    "report.py": ("--bootstrap", "many"),
    "data_Exploration/dataset_Description.py": ("--levels", "few"),
    "data_Exploration/class_distribution.py": ("--class", "rose", "--all"),
    "data_Exploration/isomap.py": ("--class", "rose"),
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def modules() -> dict[str, Path]:
    """Every module of the package and every script, by dotted name."""
    paths = list((ROOT / "flowers").rglob("*.py"))
    for folder in SCRIPT_FOLDERS:
        paths += (ROOT / folder).glob("*.py")
    return {module_name(path): path for path in paths}


MODULES = modules()


def imports_of(name: str, late: bool = True) -> set[str]:
    """What a module imports, as dotted names; without `late`, only what it imports at its top."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, functions) and not late:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found - {name}


def floor(name: str) -> int:
    if not name.startswith("flowers"):
        return SCRIPTS
    if wing(name) == PAGE:
        return 4
    if wing(name) in WINGS:
        return 3
    if name.startswith(SAMPLE):
        return 1
    return 0 if name in GROUND else 2


def wing(name: str) -> str:
    return ".".join(name.split(".")[:2])


def inner_imports() -> list[tuple[str, str]]:
    """Pairs (importer, imported) within the repository."""
    pairs = []
    for name in sorted(MODULES):
        pairs += [(name, other) for other in sorted(imports_of(name)) if other in MODULES]
    return pairs


PAIRS = inner_imports()


def test_the_graph_is_seen():
    assert ("train", "flowers.losses") in PAIRS
    assert ("flowers.data", "flowers.sample") in PAIRS  # a late import counts


def test_imports_run_down():
    assert [(a, b) for a, b in PAIRS if floor(b) > floor(a)] == []


def test_no_wing_imports_another():
    between = [(a, b) for a, b in PAIRS if floor(a) == floor(b) == 3]
    assert [(a, b) for a, b in between if wing(a) != wing(b)] == []


def test_nothing_imports_a_script():
    """But benchmarks, which share their stopwatch and their peers with one another."""
    scripts = [(a, b) for a, b in PAIRS if floor(b) == SCRIPTS]
    assert [(a, b) for a, b in scripts if not a.startswith("benchmarks.")] == []


def test_no_circle():
    graph = {name: [b for a, b in PAIRS if a == name] for name in MODULES}
    done: set[str] = set()
    path: list[str] = []

    def visit(name):
        assert name not in path, "a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", QUICK)
def test_the_quick_ones_load_no_torch(name):
    """Followed through all imports at the top of modules."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        slow = sorted(
            other for other in imports_of(module, late=False) if other.split(".")[0] in SLOW
        )
        assert not slow, f"{name} loads {slow[0]} through {module}"
        seen.add(module)
        waiting += [m for m in imports_of(module, late=False) if m in MODULES and m not in seen]


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_is_answered_before_anything_slow_is_imported(script):
    words = [sys.executable, "-X", "importtime", script, *MISTAKES[script]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    *others, last = done.stderr.splitlines()
    assert done.returncode == 2 and "error: " in last, done.stderr[-500:]
    # import time: self [us] | cumulative | module
    imported = {line.split("|")[-1].strip() for line in others if line.startswith("import time:")}
    assert "flowers" in imported
    assert not {name for name in imported if name.split(".")[0] in AFTER_FLAGS}
