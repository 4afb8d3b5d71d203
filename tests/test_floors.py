"""Who may import whom (the floors of the house), read off the syntax trees: nothing is imported here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIRST = {"config", "presets", "flags"}
# Part of dalle_ds -> the parts that it may import, itself aside.
FLOORS = {
    "__init__": set(),
    "config": set(),
    "presets": {"config"},
    "flags": {"config", "presets"},
    "tokenizer": FIRST,
    "planner": FIRST,
    "storage": {"config"},
    "models": FIRST | {"storage"},
    "data": FIRST | {"storage", "tokenizer"},
    "generation": FIRST | {"tokenizer", "models"},
    "evaluation": FIRST | {"tokenizer", "models", "generation", "data.scenes"},
    "reporting": FIRST | {"evaluation", "storage"},
    "training": FIRST | {"storage"},
    "commands": FIRST
    | {"tokenizer", "planner", "storage", "models", "data", "generation", "evaluation", "reporting", "training"},
    "cli": {"commands", "config"},
}
KERNELS = {  # part of dalle_ds -> what it may import of dalle_kernels
    "models": "dalle_kernels",
    "generation": "dalle_kernels",
    "evaluation": "dalle_kernels",
    "planner": "dalle_kernels",
    "training": "dalle_kernels.compression",
    "commands": "dalle_kernels",
}
# Package of others -> the only files that may import it.
HOMES = {
    "deepspeed": ("dalle_ds/training/", "kernels/dalle_kernels/compression/zero_hook.py"),
    "triton": (
        "kernels/dalle_kernels/attention/kernels.py",
        "kernels/dalle_kernels/attention/ops.py",
        "kernels/dalle_kernels/compression/adam_kernels.py",
        "kernels/dalle_kernels/compression/codec_kernels.py",
        "kernels/dalle_kernels/compression/panel_kernels.py",
    ),
    "boto3": ("dalle_ds/data/",),
    "sentencepiece": ("dalle_ds/tokenizer.py",),
}
LIGHT = (
    "dalle_ds/__init__",
    "dalle_ds/config",
    "dalle_ds/presets",
    "dalle_ds/flags",
    "dalle_ds/cli",
    "dalle_ds/commands/",
)
VAGUE = {"utils", "util", "helper", "helpers", "misc", "common", "manager", "tools"}


def source_files(*folders):
    return {path.relative_to(ROOT).as_posix(): path for folder in folders for path in sorted(ROOT.glob(folder))}


DALLE_DS, KERNEL_FILES = source_files("dalle_ds/**/*.py"), source_files("kernels/**/*.py")
LAUNCH = source_files("launch/*.py")
EVERY = DALLE_DS | KERNEL_FILES | LAUNCH


def imports(path, top_level_only=False):
    """Dotted names that a file imports: `from a import b` counts as a.b, which may be a module or a name in one."""
    nodes = ast.parse(path.read_text()).body if top_level_only else ast.walk(ast.parse(path.read_text()))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name, module):
    return name == module or name.startswith(f"{module}.")


def test_the_source_is_found():
    assert {"dalle_ds/cli.py", "kernels/dalle_kernels/attention/masks.py"} <= set(EVERY)


@pytest.mark.parametrize("file", DALLE_DS)
def test_a_part_imports_only_what_lies_below_it(file):
    part = Path(file).parts[1].removesuffix(".py")
    assert part in FLOORS, f"{part} has no floor: give it one in design.md and here"
    for name in imports(DALLE_DS[file]):
        if is_under(name, "dalle_ds") and name not in ("dalle_ds", "dalle_ds.__version__"):
            below = FLOORS[part] | {part}
            assert any(is_under(name, f"dalle_ds.{other}") for other in below), f"{file} imports {name}"
        elif is_under(name, "dalle_kernels"):
            assert part in KERNELS, f"{file} imports {name}"
            assert is_under(name, KERNELS[part]), f"{file} imports {name}"


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_kernels_stand_on_torch_and_triton_alone(file):
    allowed = {"torch", "triton", "dalle_kernels"} | sys.stdlib_module_names
    allowed |= {"deepspeed"} if file.endswith("compression/zero_hook.py") else set()
    assert {name.partition(".")[0] for name in imports(KERNEL_FILES[file])} <= allowed


@pytest.mark.parametrize("package", HOMES)
def test_a_package_of_others_is_imported_in_its_home_alone(package):
    users = [file for file, path in EVERY.items() if any(is_under(name, package) for name in imports(path))]
    assert [file for file in users if not file.startswith(HOMES[package])] == []
    if package == "boto3":
        assert len(users) <= 1


@pytest.mark.parametrize("file", [file for file in DALLE_DS if file.startswith(LIGHT)])
def test_settings_and_commands_import_nothing_heavy_when_they_are_imported(file):
    """What runs before --help answers: the standard library, and each other."""
    parts = {name.partition(".")[0] for name in imports(DALLE_DS[file], top_level_only=True)}
    assert parts <= sys.stdlib_module_names | {"dalle_ds"}
    for name in imports(DALLE_DS[file], top_level_only=True):
        if is_under(name, "dalle_ds") and name not in ("dalle_ds", "dalle_ds.__version__"):
            light = [f"dalle_ds.{part}" for part in ("config", "presets", "flags", "commands")]
            assert any(is_under(name, module) for module in light), f"{file} imports {name}"


@pytest.mark.parametrize("file", LAUNCH)
def test_a_launch_script_is_a_docstring_and_one_call(file):
    assert [name for name in imports(LAUNCH[file]) if not is_under(name, "dalle_ds.cli")] == []
    tree = ast.parse(LAUNCH[file].read_text())
    assert ast.get_docstring(tree)
    assert "deepspeed" in ast.get_docstring(tree) or "python" in ast.get_docstring(tree)
    assert len(tree.body) == 3  # docstring, import, `if __name__ == "__main__"`


def test_no_file_or_folder_has_a_name_that_says_nothing():
    assert [file for file in EVERY if VAGUE & set(Path(file).with_suffix("").parts)] == []
