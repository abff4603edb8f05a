"""Settings have the declared types: each boolean, whole number, number and list refuses everything else."""

import contextlib
import fnmatch
import typing

import pytest
from builders import compose_config
from omegaconf import OmegaConf

from primeflow_perturbench.annotations import described, fits
from primeflow_perturbench.errors import InputError
from primeflow_perturbench.training.setting_types import LEAST, check_types, check_values, declared

GIVEN = {
    "train": ["data.data.filename=x.h5ad"],
    "predict": ["ckpt_path=x.ckpt", "prediction_dataframe_path=x.csv"],
}
# Values that no setting of a type may have, by words of `described`.
WRONG = {
    "true or false": ["no", "maybe", "true", 1, 0.5],
    "a whole number": ["many", "3", 2.5, True, float("nan"), [3]],
    "a finite number": ["fast", True, float("nan"), float("inf"), [0.5]],
    "a list of text": ["text", 3, {"a": "b"}],
    "text": [True, ["x"], {"a": "b"}],
    "a mapping of settings": [3, "text"],
}


@pytest.fixture(scope="module", params=GIVEN)
def settings(request):
    """All settings of a command, resolved."""
    cfg = compose_config([*GIVEN[request.param], "paths.output_dir=out", "run_name=test"], root=request.param)
    return OmegaConf.to_container(cfg, resolve=True)


@contextlib.contextmanager
def changed(settings, key, value):
    """The settings with another value at a dotted key."""
    *parents, last = key.split(".")
    node = settings
    for parent in parents:
        node = node[parent]
    before, node[last] = node[last], value
    yield settings
    node[last] = before


def test_the_defaults_have_the_declared_types(settings):
    kinds = {key: described(kind) for key, _, kind in declared(settings)}
    assert len(kinds) > 40
    check_values(settings)


def test_each_setting_refuses_values_of_other_types(settings):
    tried = 0
    for key, _, kind in list(declared(settings)):
        for value in WRONG.get(described(kind).removesuffix(" or null"), ()):
            with changed(settings, key, value), pytest.raises(InputError) as refused:
                check_values(settings)
            assert str(refused.value).startswith(f"{key} must be {described(kind)}, got ")
            tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("data.loader.batch_size", 0),
        ("data.loader.num_workers", -1),
        ("model.lr", -1),
        ("model.wd", -0.1),
        ("model.network.width", 0),
        ("trainer.max_steps", 0),
        ("trainer.max_steps", -2),
        ("trainer.val_check_interval", 0),
        ("trainer.accumulate_grad_batches", 0),
    ],
)
@pytest.mark.parametrize("settings", ["train"], indirect=True)
def test_numbers_have_least_values(settings, key, value):
    expected = pytest.raises(InputError, match=rf"^{key} must be (at least|above) .*, got {value}$")
    with changed(settings, key, value), expected:
        check_values(settings)


def test_minus_one_is_no_limit_of_steps():
    check_types(compose_config([*GIVEN["train"], "paths.output_dir=out", "run_name=test", "trainer.max_steps=-1"]))


def test_an_unknown_setting_of_an_object_names_the_nearest():
    cfg = compose_config([*GIVEN["train"], "paths.output_dir=out", "run_name=test", "+model.network.widht=3"])
    with pytest.raises(InputError, match=r"ResidualMLP has no setting 'widht' \(did you mean 'width'\?\)"):
        check_types(cfg)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, float, True),
        (True, float, False),
        (True, int, False),
        (1, bool, False),
        (1, typing.Literal[True], False),
        ("auto", int | typing.Literal["auto"], True),
        ("many", int | typing.Literal["auto"], False),
        ([1, "a"], typing.Sequence[int], False),
        ({"a": 1}, typing.Mapping[str, float], True),
        ({"a": "b"}, typing.Mapping[str, float], False),
        (5, str, True),
        (2**60, int, False),
    ],
)
def test_fits(value, kind, expected):
    assert fits(value, kind, loose=True) is expected


def test_least_values_belong_to_settings_that_exist():
    keys = set()
    for given in (["model/space=pca"], ["model=primeflow"], ["~trainer.gradient_clip_val", "+trainer.num_nodes=1"]):
        cfg = compose_config([*GIVEN["train"], "paths.output_dir=out", "run_name=test", *given])
        keys |= {key for key, _, _ in declared(OmegaConf.to_container(cfg, resolve=True))}
    cfg = compose_config([*GIVEN["predict"], "paths.output_dir=out", "run_name=test"], root="predict")
    keys |= {key for key, _, _ in declared(OmegaConf.to_container(cfg, resolve=True))}
    unused = [pattern for pattern in LEAST if not fnmatch.filter(keys, pattern)]
    assert unused == ["callbacks.*.refresh_rate"] or not unused
