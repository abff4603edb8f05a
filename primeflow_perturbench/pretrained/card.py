"""The page that a shared model is introduced by."""

from collections.abc import Mapping
from typing import Any

CARD = """\
---
{license}library_name: primeflow-perturbench
tags:
- single-cell
- perturbation
- flow-matching
---
# PRiMeFlow model

It generates log1p expression of {genes:,} genes for {perturbations:,} perturbations{alone_or_combined}{covariates}.

```python
from primeflow_perturbench import PRiMeFlow

model = PRiMeFlow.from_pretrained("FOLDER")
cells = model.sample([{example}], n=100)
```

`config.json` holds settings and names, `model.safetensors` the tensors; neither can run code.
{sections}"""


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown that introduces a model, from its ``config.json``."""
    context = config["context"]
    delimiter = context["perturbation_combination_delimiter"]
    names = context["covariate_keys"]
    example = {"perturbation": context["perturbation_uniques"][0]}
    for name in names:
        uniques = context["covariate_uniques"][name]
        example[name] = 1.0 if uniques is None else uniques[0]
    return CARD.format(
        license=f"license: {config['license']}\n" if config["license"] else "",
        genes=len(config["genes"]),
        perturbations=len(context["perturbation_uniques"]),
        alone_or_combined=f", alone or joined by `{delimiter}`," if delimiter else "",
        covariates=f" and the covariates {', '.join(f'`{name}`' for name in names)}" if names else "",
        example=example,
        sections="".join(map(_section, *zip(*_sections(config), strict=True))),
    )


def _sections(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Title and entries of each section."""
    sections = [("Versions", config["versions"])]
    if config["data"]:
        sections.insert(0, ("Training data", config["data"]))
    if config["metrics"]:
        sections.insert(0, ("Held-out conditions", config["metrics"]))
    return sections


def _section(title: str, entries: Mapping[str, Any]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in entries.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{lines}"
