"""One configuration: the calls and the command line cannot drift apart."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import fields
from typing import Any

import pytest

from hf_rmsnorm import PatchError, cli, patch_model, plan_patch
from hf_rmsnorm.cli_options import parser
from hf_rmsnorm.patching.config import PatchConfig

DEFAULTS = {field.name: field.default for field in fields(PatchConfig)}


def arguments(call: Any) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("model", "inputs")}


def test_the_calls_take_what_a_config_holds() -> None:
    assert arguments(patch_model) == DEFAULTS
    del (rest := dict(DEFAULTS))["keep_originals"]
    assert arguments(plan_patch) == rest


@pytest.mark.parametrize("command", [["inspect", "gpt2"], ["patch", "gpt2", "out"]])
def test_the_command_line_takes_what_a_config_holds(command: list[str]) -> None:
    given: argparse.Namespace = parser(cli.COMMANDS).parse_args(command)
    rest = {**DEFAULTS}
    del rest["keep_originals"]  # of a model that is written and gone
    assert cli._patch_arguments(given) == rest


def test_a_config_is_checked_when_it_is_made() -> None:
    with pytest.raises(PatchError, match="norm must be one of rmsnorm, prmsnorm; got 'rms'"):
        PatchConfig(norm="rms")
