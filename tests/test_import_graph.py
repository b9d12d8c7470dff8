"""The rooms of the package: imports only go down the floors, in no circle, and take no private names."""

import ast
from pathlib import Path

import pytest

import sparc_loss

PACKAGE = Path(sparc_loss.__file__).parent
# From the ground up; a room imports from its own floor or from those before it. The deprecated names are not here.
FLOORS = (
    ("_arithmetic", "_checks", "_files", "_masks", "_nearest", "named_objects", "open_clip_versions"),
    ("functional",),
    ("fused", "diagnostics"),
    ("losses", "embeddings", "testing"),
    ("", "model_loading"),
    ("evaluation",),
    ("regions", "show"),
    ("monitoring",),
    ("plugins",),
    ("hooks",),
    ("train", "cli"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OLD_NAMES = ("integration", "integration.plugin", "metrics", "fused_contrast")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imports(module: str, lazy: bool) -> set[tuple[str, str]]:
    """(module, name) of what `module` imports of the package, also within functions if `lazy`."""
    found = set()
    for node in ast.walk(MODULES[module]) if lazy else MODULES[module].body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparc_loss":
            source = node.module.removeprefix("sparc_loss").removeprefix(".")
            for alias in node.names:
                submodule = f"{source}.{alias.name}".strip(".")
                found.add((submodule, "") if submodule in MODULES else (source, alias.name))
    return found


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(OLD_NAMES)))
def test_imports_go_to_the_same_room_or_down(module: str) -> None:
    # `sparc_loss` itself gives lazily what lies above it.
    for source, name in imports(module, lazy=module != ""):
        if (source, name) != ("", "__version__") and room(source) != room(module):
            assert FLOOR[room(source)] <= FLOOR[room(module)], f"{module} imports {source}"


def test_no_import_is_in_a_circle() -> None:
    done: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for source, _ in imports(module, lazy=False):
                if source != module:
                    visit(source, (*path, module))
            done.append(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_another_ones_private_names(module: str) -> None:
    private = {name for _, name in imports(module, lazy=True) if name.startswith("_") and name != "__version__"}
    assert not private
