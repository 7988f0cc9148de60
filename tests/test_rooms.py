"""Imports run downward only, and the rooms that another project can take without flax import jax, numpy and the standard library alone."""

import ast
import pathlib
import sys

import pytest

import prenorm_jax

PACKAGE = pathlib.Path(prenorm_jax.__file__).parent
ORDER = [
    "paths",
    "bases",
    "fingerprints",
    "precision",
    "placement",
    "hopper",
    "norms",
    "main_branch",
    "layouts",
    "transforms",
    "manifest",
    "tracing",
    "models",
    "interop",
    "training",
    "measure",
]
ANYWHERE = {"version"}
LIBRARIES = {
    **{room: {"jax", "numpy"} for room in ORDER[: ORDER.index("models")]},
    "models": {"jax", "numpy", "flax"},
    "interop": {"jax", "numpy", "flax", "ml_dtypes", "rich"},
}
OWN = {
    "torch_norms": {"torch", "transformers"},  # a file to copy into a project without JAX
    "data": {"absl"},  # grain's flags, which are absl's
}
ENTRY_POINTS_ALONE = {"absl", "ml_collections"}


def imports(source):
    """The modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            whole = node.module == "prenorm_jax"
            yield from (f"{node.module}.{alias.name}" if whole else node.module for alias in node.names)


def faults(room, source):
    """What a source of a room imports and may not."""
    lower = {*ORDER[: ORDER.index(room) + 1], *ANYWHERE}
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "prenorm_jax":
            if (rest[0] if rest else "models") not in lower:  # the package itself holds all that models may build on
                yield name
        elif top in ENTRY_POINTS_ALONE or (room in LIBRARIES and top not in LIBRARIES[room] | sys.stdlib_module_names):
            yield name


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, path


@pytest.mark.parametrize(("room", "path"), list(sources()), ids=lambda part: str(getattr(part, "stem", part)))
def test_a_room_imports_what_lies_below_it(room, path):
    assert room in [*ORDER, *ANYWHERE], f"{path.name}: a new room; say in ORDER where it stands"
    if room in ORDER:
        own = OWN.get(path.stem, set())
        assert not [name for name in faults(room, path.read_text()) if name.partition(".")[0] not in own]


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        ("norms", "import prenorm_jax.transforms", "prenorm_jax.transforms"),
        ("transforms", "def f():\n    from prenorm_jax.models import apply", "prenorm_jax.models"),
        ("tracing", "import flax.nnx", "flax.nnx"),
        ("main_branch", "from prenorm_jax import transforms", "prenorm_jax.transforms"),
        ("training", "import ml_collections", "ml_collections"),
        ("models", "import optax", "optax"),
    ],
)
def test_an_upward_or_foreign_import_is_found(room, source, fault):
    assert list(faults(room, source)) == [fault]


def test_the_public_names_are_those_of_init():
    assert all(hasattr(prenorm_jax, name) for name in prenorm_jax.__all__)
    public = {name for name in vars(prenorm_jax) if not name.startswith("_")}
    rooms = {*ORDER, *ANYWHERE}
    assert public - rooms - {"VERSION"} == set(prenorm_jax.__all__) - rooms
