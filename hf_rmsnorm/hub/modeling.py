"""The modeling file of a patched checkpoint, for readers without the package.

It is assembled from the package's own source, so that there is no second implementation: a line
`$module:Name` of the template stands for the source of that class, function or method.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from pathlib import Path

from .. import errors, functional, modules, names
from ..ops import reference
from ..patching import apply, changes, plan
from ..probing import facts, postnorm
from . import configs, per_layer, records

MODULE = "modeling_hf_rmsnorm"
FILE = f"{MODULE}.py"

_TEMPLATE = Path(__file__).with_name(f"{FILE}.in")
_SOURCES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        apply,
        changes,
        configs,
        errors,
        facts,
        functional,
        modules,
        names,
        per_layer,
        plan,
        postnorm,
        records,
        reference,
    )
}
_VALUES = {
    "model_type": configs.MODEL_TYPE,
    "record": records.RECORD,
    "places": apply.PLACES,
    "place": repr(configs.PLACE),
    "version": plan.FORMAT_VERSION,
    "keys": ", ".join(f'"{key}"' for key in sorted(records.KEYS)),
}


@functools.cache
def source() -> str:
    """The text of the file; the same for every model."""
    text = _TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"\$(\w+)(?![\w:])", lambda found: str(_VALUES[found[1]]), text)
    text = re.sub(r"^\$(\w+):([\w.]+)\n", _piece, text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}(?=\S)", "\n\n\n", text)
    return re.sub(r"\n{2,}(?= )", "\n\n", text)


def _piece(found: re.Match[str]) -> str:
    module, name = found.groups()
    return "\n\n" + inspect.getsource(operator.attrgetter(name)(_SOURCES[module])) + "\n\n"
