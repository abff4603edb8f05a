"""Each setting has one default: a constructor in Python and the YAML that builds it agree."""

import inspect
from pathlib import Path

import primeflow_perturbench.configs
import pytest
import yaml
from hydra.utils import get_object

CONFIGS = Path(primeflow_perturbench.configs.__file__).parent
# Named variants differ from the defaults on purpose: recipes of a data set or run, and smaller sizes.
VARIANTS = ("experiment/", "model/primeflow_", "data/")
# The same class as unet.yaml in another size; its `genes` are compared.
OTHER_SIZES = ("model/network/unet_patches.yaml",)


def objects(node, where):
    """Every mapping with a ``_target_`` of ours in a YAML file, with its place."""
    if isinstance(node, dict):
        if str(node.get("_target_", "")).startswith("primeflow_perturbench."):
            yield where, node
        for key, value in node.items():
            yield from objects(value, f"{where}:{key}")


def described():
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS))
        if not name.startswith(VARIANTS):
            yield from (case for case in objects(yaml.safe_load(path.read_text()), name) if is_ours(*case))


def is_ours(where, node):
    """Whether the parameters are our own, not inherited from a library."""
    target = get_object(node["_target_"])
    constructor = target.__init__ if inspect.isclass(target) else target
    return getattr(constructor, "__module__", "").startswith("primeflow_perturbench.") and where not in OTHER_SIZES


@pytest.mark.parametrize(("where", "node"), [pytest.param(*case, id=case[0]) for case in described()])
def test_python_and_yaml_have_the_same_defaults(where, node):
    differ = {}
    for name, parameter in inspect.signature(get_object(node["_target_"])).parameters.items():
        default, written = parameter.default, node.get(name)
        # Nested objects are compared on their own; interpolations have their value elsewhere.
        plain = not isinstance(written, dict) and not str(written).startswith("${")
        if name in node and plain and default is not inspect.Parameter.empty:
            same = list(default) == written if isinstance(default, tuple) else default == written
            # `none` is how a null that overrides another value is written.
            if not same and not (default is None and written == "none"):
                differ[name] = (default, written)
    assert not differ, f"{where}: {{name: (Python, YAML)}} {differ}"


def test_the_models_of_the_paper_are_compared():
    assert {"model/primeflow.yaml", "model/primeflow.yaml:sampler", "model/network/unet.yaml"} <= dict(
        described()
    ).keys()
