"""Who may import whom: a part imports only from the layers below it, and who talks to torch.distributed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kd_accel"

# From the bottom up. A string is a group whose files may import each other; groups of one layer never do.
# A folder stands for its files, unless one of them is named by itself.
LAYERS = (
    (
        "__init__ types whole_files schema config_files schedules terms augment_config cache_config"
        " data_config sections config pack_config filter_config download_config embed_config eval_config"
        " probe_config train_eval_config prepare_config export_config predict_config push_config plan_config"
        " doctor_config bench_config index_config report_config demo_config slurm help leave verbs",
    ),
    ("timing", "text_files"),
    ("distributed", "processes", "losses", "random_state signals logs"),
    ("trim", "environment"),
    ("memory", "models", "data", "blame", "replay"),
    ("objective own_optimizer chunks temperature bindings recall fit", "stored_teacher", "int8", "lost"),
    (
        "launch engine masters held optim lamb metrics checkpoint snapshot saver resume memory_files bad_samples"
        " assembly episodes evals push.background",
    ),
    (
        "train",
        "embed",
        "evals.suite",
        "evals.prepare",
        "predict",
        "report",
        "filter",
        "pack",
        "download",
        "index",
        "plan",
    ),
    ("export push", "doctor", "bench"),  # the card shows what the report does, the doctor looks at shapes as plan does
    ("demo",),  # runs the other verbs
    ("cli __main__",),
)
WITHOUT_TORCH = f"{LAYERS[0][0]} __main__ cli".split()
MAY_TALK = ("distributed", "processes")  # the modules that may use torch.distributed


def layer_and_group(module: str) -> tuple[int, str] | None:
    """Where a module ("evals.suite") stands in the table: its own line, or that of its folder."""
    for name in (module, module.partition(".")[0]):
        for layer, groups in enumerate(LAYERS):
            for group in groups:
                if name in group.split():
                    return layer, group
    return None


def violations(package: Path) -> list[str]:
    """One line for everything in the package that the table does not allow."""
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    found = []
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if layer_and_group(module) is None:
            found.append(f"{module}: give it a layer in {Path(__file__).name}")
            continue
        imports = list(_imports(tree, files))
        found += [f"{module} imports {target}" for target in imports if not _allowed(module, target)]
        if module not in MAY_TALK and "torch.distributed" in [*imports, *_attributes(tree)]:
            found.append(f"{module} uses torch.distributed")
        if module in WITHOUT_TORCH and any(t.split(".")[0] == "torch" for t in _imports(_at_run_time(tree), files)):
            found.append(f"{module} imports torch")
    return found


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    """Our modules as they are named in `files`, others as they are written, also those imported inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"{'.' * node.level}{node.module or ''}"]
        elif isinstance(node, ast.ImportFrom):
            # `from a import b` reaches the module a.b, or the module a with its name b
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield _ours(name, files) if name.split(".")[0] == PACKAGE.name else _torch_distributed(name)


def _ours(name: str, files: dict[str, Path]) -> str:
    inside = name.partition(".")[2]
    while inside and inside not in files:
        inside = inside.rpartition(".")[0]
    return f"{PACKAGE.name}.{inside or '__init__'}"


def _torch_distributed(name: str) -> str:
    return "torch.distributed" if f"{name}.".startswith("torch.distributed.") else name


def _attributes(tree: ast.AST) -> Iterator[str]:
    """Dotted names of two parts in expressions, like torch.distributed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def _at_run_time(tree: ast.AST) -> ast.Module:
    """The tree without its `if TYPE_CHECKING:` blocks at the top."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(body, type_ignores=[])


def _allowed(module: str, target: str) -> bool:
    if target.startswith("."):
        return False  # relative imports hide the direction
    package, _, inside = target.partition(".")
    if package != PACKAGE.name or layer_and_group(inside) is None:
        return True
    (layer, group), (target_layer, target_group) = layer_and_group(module), layer_and_group(inside)
    return target_layer < layer or target_group == group


def test_imports_go_down():
    """Also those inside functions and under TYPE_CHECKING."""
    assert violations(PACKAGE) == []


def test_the_table_has_no_stale_lines():
    listed = {name for groups in LAYERS for group in groups for name in group.split()}
    missing = [name for name in listed if not list(PACKAGE.glob(name.replace(".", "/") + "*"))]
    assert missing == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("losses/x.py", "from kd_accel.objective import Objective", "losses.x imports kd_accel.objective"),
        ("losses/x.py", "import kd_accel.train", "losses.x imports kd_accel.train"),
        ("losses/x.py", "from kd_accel import distributed", "losses.x imports kd_accel.distributed"),
        ("models/x.py", "from kd_accel.data.order import epoch_order", "models.x imports kd_accel.data.order"),
        ("engine.py", "def f():\n    from kd_accel import train", "engine imports kd_accel.train"),
        ("evals/encoder.py", "from kd_accel.evals.suite import run", "evals.encoder imports kd_accel.evals.suite"),
        ("config.py", "if TYPE_CHECKING:\n    from kd_accel import losses", "config imports kd_accel.losses"),
        ("data/x.py", "from . import order", "data.x imports ."),
        ("engine.py", "import torch.distributed as dist", "engine uses torch.distributed"),
        ("engine.py", "from torch import distributed", "engine uses torch.distributed"),
        ("engine.py", "from torch.distributed.nn import all_gather", "engine uses torch.distributed"),
        ("engine.py", "import torch\ntorch.distributed.barrier()", "engine uses torch.distributed"),
        ("types.py", "from torch import Tensor", "types imports torch"),
        ("config.py", "def f():\n    import torch", "config imports torch"),
        ("helpers.py", "", "helpers: give it a layer in test_layers.py"),
    ],
)
def test_a_violation_is_found(file, source, expected, tmp_path):
    """Each way to break the table, in a package that has only the files it names."""
    package = tmp_path / "kd_accel"
    for name in ("objective", "train", "distributed", "data/order", "evals/suite", "losses/__init__"):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(source)
    assert violations(package) == [expected]


def test_what_is_allowed_is_not_reported(tmp_path):
    package = tmp_path / "kd_accel"
    (package / "data").mkdir(parents=True)
    (package / "types.py").write_text("if TYPE_CHECKING:\n    from torch import Tensor")
    (package / "distributed.py").write_text("import torch.distributed as dist\nfrom kd_accel import __version__")
    (package / "data/order.py").touch()
    (package / "data/loader.py").write_text(
        "import torch\nfrom kd_accel.data.order import x\nfrom kd_accel import types"
    )
    (package / "train.py").write_text("from kd_accel.data import order\nfrom kd_accel import distributed")
    assert violations(package) == []


@pytest.mark.parametrize("module", [name for name in WITHOUT_TORCH if not name.startswith("__")])
def test_config_loads_no_torch(module):
    """In a fresh Python, whatever the sources say."""
    code = f"import sys, kd_accel.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
