"""Settings are declared once: `convert`, its docstring and the command line agree with them."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from logshift.converter import InputError, convert
from logshift.converter.settings import Settings, Target, declared

SETTINGS = declared(Settings) | declared(Target)
DEFAULTS = {f.name: f.default for kind in (Settings, Target) for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", SETTINGS)
def test_convert_takes_every_setting(name):
    parameter = inspect.signature(convert).parameters[name]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    # What is not given is chosen where there is a target.
    assert parameter.default == (None if name == "weight_bits" else DEFAULTS[name])


def test_the_docstring_of_convert_names_all_its_parameters():
    text = inspect.getdoc(convert)
    parameters = text[text.index("Parameters\n") : text.index("Returns\n")]
    named = [line.split(" : ")[0] for line in parameters.splitlines()[2:] if line[:1].strip()]
    assert named == list(inspect.signature(convert).parameters)
    types = dict(line.split(" : ") for line in parameters.splitlines() if " : " in line)
    for name, about in SETTINGS.items():
        if about.choices is not None:
            assert sorted(about.choices) == sorted(ast.literal_eval(types[name]))


@pytest.mark.parametrize("name", [name for name, about in SETTINGS.items() if about.range])
def test_ranges_and_their_help(name):
    low, high = SETTINGS[name].range
    assert f"{low:g} to {high:g}" in SETTINGS[name].help
    for value in (low, high):
        Settings(**{name: value})
    for value in (low - 1, high + 1):
        with pytest.raises(InputError, match=name):
            Settings(**{name: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 256),
        ({"tile": 100}, 100),
        ({"granularity": "tile"}, (16, 16)),
        ({"granularity": "tile", "tile": 100}, 100),
        ({"granularity": "tile", "tile": (3, 256)}, (3, 256)),
        ({"granularity": "tile", "tile": [3, 256]}, (3, 256)),
        ({"granularity": "filter"}, 256),
    ],
)
def test_what_a_tile_is(given, expected):
    settings = Settings(**given)
    assert settings.tile == expected
    assert dataclasses.replace(settings, weight_bits=3).tile == expected


def test_the_command_line_has_an_option_for_every_setting():
    pytest.importorskip("typer", reason="needs the extra `cli`")
    from logshift.converter.cli.convert import convert as command

    options = inspect.signature(command).parameters
    assert SETTINGS.keys() <= options.keys()
    order = [name for name in inspect.signature(convert).parameters if name in SETTINGS]
    assert [name for name in options if name in SETTINGS] == order
