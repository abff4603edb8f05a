"""The model card: the README.md of a shared model."""

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

The model generates log1p expression of {genes:,} genes for {perturbations:,} perturbations{combined}{covariates}.

```python
from primeflow_perturbench import PRiMeFlow

model = PRiMeFlow.from_pretrained("FOLDER")
cells = model.sample([{example}], n=100)
```

`config.json` contains settings and names, `model.safetensors` the tensors; reading them executes no code.
{sections}"""


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown that describes a model, from its ``config.json``."""
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
        combined=f", single or combined with `{delimiter}`," if delimiter else "",
        covariates=f" and the covariates {', '.join(f'`{name}`' for name in names)}" if names else "",
        example=example,
        sections="".join(
            _section(title, config[entry])
            for title, entry in (
                ("Held-out conditions", "metrics"),
                ("Training data", "data"),
                ("Versions", "versions"),
            )
            if config[entry]
        ),
    )


def _section(title: str, entries: Mapping[str, Any]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in entries.items())
    return f"\n## {title}\n\n| | |\n|---|---|\n{lines}"
