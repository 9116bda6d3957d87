"""How a card presents what a run measured: in words, in cells of tables, and as `model-index`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from .card_merge import RESULT_MARK
from .runs import NOT_MEASURED, Run, spread_text

METRICS = {"perplexity": "perplexity", "token_accuracy": "accuracy"}  # names the Hub knows
TASK = "text-generation"  # what scripts/ train and measure


def texts(run: Run) -> dict[str, Any]:
    """What the template prints of a run beside its tables."""
    git = run.environment["git"]
    code = "not in a git checkout"
    if git:
        code = git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    start, data = run.start, run.data
    if start.get("name"):
        from_model = f"the trained model `{start['name']}`"
    elif start.get("config_name"):
        overrides = f" with {start['config_overrides']}" if start["config_overrides"] else ""
        from_model = f"new weights (`{start['config_name']}`{overrides})"
    else:
        from_model = "not recorded"
    text = _text_name(data) or "not recorded by name"
    if data.get("fingerprint"):
        text += f" (fingerprint of its tokens: {data['fingerprint']})"
    if data.get("validation_blocks"):
        text += f", scored on {data['validation_blocks']} blocks of {data['block_size']} tokens"
    cells = {"ratio": _ratio, "step_ms": _step_ms, "memory": _memory}
    return {"code": code, "start": from_model, "text": text, **cells}


def _text_name(data: Mapping[str, Any]) -> str:
    names = [data["dataset"]] if data.get("dataset") else data.get("files", ())
    config = f" ({data['config']})" if data.get("config") else ""
    return " and ".join(f"`{name}`" for name in names) + config


def _ratio(speed: Mapping[str, Any], is_control: bool) -> str:
    if is_control:
        return "1"
    return spread_text(speed["speed_ratio"], ".3f") if "speed_ratio" in speed else NOT_MEASURED


def _memory(speed: Mapping[str, Any]) -> str:
    peak = speed["peak_memory_bytes"]
    return NOT_MEASURED if peak is None else f"{peak / 2**20:.0f}"


def _step_ms(speed: Mapping[str, Any]) -> str:
    return " / ".join(f"{1000 * speed[f'step_s_p{q}']:.1f}" for q in (10, 50, 90))


def eval_results(run: Run) -> list[EvalResult]:
    """Every measured quality of this arm and of the unpatched control, with its spread."""
    data = run.data
    name = _text_name(data).replace("`", "") or "local text"
    found = []
    for row in run.results:
        if not row.is_control and row.arm != run.arm:
            continue
        for moment, values in row.moments.items():
            when = "before training" if moment == "before" else f"after {run.steps} steps"
            for quality, spread in values.items():
                if spread is None:
                    continue
                mark = "unpatched" if row.is_control else "patched"
                found.append(
                    EvalResult(
                        task_type=TASK,
                        dataset_type=data["dataset"] if data.get("is_local") is False else "text",
                        dataset_name=name,
                        dataset_config=data.get("config"),
                        dataset_split="validation",
                        metric_type=METRICS.get(quality, quality),
                        metric_name=f"{quality.replace('_', ' ')}, {row.label}, {when}",
                        metric_value=spread["median"],
                        metric_args={
                            RESULT_MARK: mark,
                            "seeds": list(run.seeds),
                            "min": spread["min"],
                            "max": spread["max"],
                        },
                    )
                )
    return found
