"""experiments/clients: the recorded runs of other people's programs are of what is committed."""

import re

import pytest

from experiments.clients import table
from experiments.clients.clients import CLIENTS, HERE, Client, key, versions

RESULTS = table.committed()
each_client = pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])


@each_client
def test_what_is_recorded_is_for_these_pins_and_this_program(client: Client):
    """A version that was raised, or a program that was changed, is run again: `make clients`."""
    assert RESULTS[client.name]["key"] == key(client)
    assert RESULTS[client.name]["versions"] == versions(client)


@each_client
def test_each_environment_is_pinned(client: Client):
    """Each package with its version; with what jadam needs, and not older than it allows."""
    lines = client.pins.read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+( ; .*)?", line) for line in lines)
    pinned = dict(line.split(" ;")[0].split("==") for line in lines)
    assert {"jax", "jaxlib", "jaxtyping", "optax"} <= pinned.keys()
    assert tuple(map(int, pinned["jax"].split(".")[:2])) >= (0, 10)
    assert len(client.program.read_text().splitlines()) <= 70


@each_client
def test_each_program_does_what_it_does_with_optax(client: Client):
    """The losses are the same, and each test with another outcome is one that is expected."""
    result = RESULTS[client.name]
    assert not any("error" in x for x in result.values() if isinstance(x, dict))
    if client.is_tests:
        assert table.changed(result).keys() == client.expected.keys()
    else:
        assert table.difference(result) <= client.tolerance


def test_every_program_and_every_pin_has_a_client():
    """Nothing lies there that is never run."""
    names = {client.name for client in CLIENTS}
    for folder in ("programs", "pins"):
        assert {path.stem for path in (HERE / folder).iterdir() if path.is_file()} == names
    assert RESULTS.keys() == names
