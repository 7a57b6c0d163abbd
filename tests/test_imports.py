"""Every module can be imported: a dependency that has lost a name is seen here first."""

import pkgutil
from importlib import import_module

import pytest

import policy_split_jax

# Each is named with the package that it alone needs.
NEEDS = {"policy_split_jax.sampler.jetstream": "jetstream"}


@pytest.mark.parametrize(
    "name", [found.name for found in pkgutil.walk_packages(policy_split_jax.__path__, "policy_split_jax.")]
)
def test_a_module_is_imported(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert import_module(name).__name__ == name
