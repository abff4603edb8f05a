"""How cells are sampled from a trained model. Only `calibrate` and `control_start` change what training does."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from primeflow_perturbench.errors import InputError
from primeflow_perturbench.flow.solver import ODESolver

# Names of shares of the way that calibration goes.
CALIBRATIONS: dict[Any, float] = {"none": 0.0, "marginals": 1.0}


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling, ``model.sampler`` in the configuration.

    Attributes
    ----------
    solver
        ODE solver.
    guidance
        Strength w of classifier-free guidance (Ho and Salimans 2022); 1 is none.
    control_start
        Counterfactual sampling: a time t in (0, 1) at which control cells of the context enter, or of the nearest
        context if it has none. Their points ``t x + (1 - t) noise`` are transported to noise by the flow of the control
        condition, and from there to data by that of the requested condition (as in dual diffusion implicit bridges, Su
        et al. 2023), so that cells keep what the flow does not model, such as the gene-gene structure of an unseen
        context. It doubles the network evaluations and needs control cells, which training keeps if this is set.
        ``None`` (also written ``"none"``) starts from noise; ``"auto"`` decides between the two on held-out conditions,
        see `sampling.choice`.
    detection_limit
        Generated values below it become exactly 0: a number in log1p units, ``"learned"`` from the training cells, or
        ``None`` (also written ``"none"``) to keep all positive values.
    calibrate
        ``"marginals"`` maps each gene of a condition to the mean, the share of expressing cells and the spread that a
        linear mixed model predicts from the training cells; ``"none"`` leaves the values as they are; a number in
        [0, 1] goes that share of the way; ``"auto"`` decides on held-out conditions, see `sampling.choice`. Training
        collects the statistics only where this is not ``"none"``.
    calibration_cells
        Number of cells of each condition that determine its map. They are generated even if fewer are requested.
    cells_per_condition
        Number of cells generated for each condition in a test; ``None`` generates one for each row of PerturBench's
        table.
    sample_batch_size
        Maximum number of cells in one forward pass on an accelerator; ``"auto"`` fills its free memory.
    compile
        Whether ``torch.compile`` compiles the network, for training and sampling.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    solver: ODESolver = field(default_factory=ODESolver)
    guidance: float = 1.0
    control_start: float | Literal["auto", "none"] | None = None
    detection_limit: float | Literal["learned", "none"] | None = None
    calibrate: float | Literal["none", "marginals", "auto"] = "none"
    calibration_cells: int = 1000
    cells_per_condition: int | None = None
    sample_batch_size: int | Literal["auto"] = 256
    compile: bool = False

    def __post_init__(self):
        for name in ("detection_limit", "control_start"):
            if getattr(self, name) == "none":
                object.__setattr__(self, name, None)
        if not self.guidance >= 0:
            raise InputError(f"guidance must be at least 0, got {self.guidance}")
        start = self.control_start
        if start not in (None, "auto") and (isinstance(start, str) or not 0 < start < 1):
            raise InputError(f"control_start must be between 0 and 1, 'auto' or null, got {start!r}")
        limit = self.detection_limit
        if isinstance(limit, str) and limit != "learned":
            raise InputError(f"detection_limit must be 'learned', 'none' or a number, got {limit!r}")
        if isinstance(limit, float | int) and not limit >= 0:
            raise InputError(f"detection_limit must be at least 0, got {limit}")
        share = CALIBRATIONS.get(self.calibrate, self.calibrate)
        if share != "auto" and (isinstance(share, str | bool) or not 0 <= share <= 1):
            raise InputError(
                f"calibrate must be 'none', 'marginals', 'auto' or a number in [0, 1], got {self.calibrate!r}"
            )
        if self.calibration_cells < 1:
            raise InputError(f"calibration_cells must be at least 1, got {self.calibration_cells}")
        if self.cells_per_condition is not None and self.cells_per_condition < 1:
            raise InputError(f"cells_per_condition must be at least 1, got {self.cells_per_condition}")
        size = self.sample_batch_size
        if size != "auto" and (isinstance(size, str) or size < 1):
            raise InputError(f"sample_batch_size must be at least 1, or 'auto', got {size!r}")

    @property
    def calibration(self) -> float:
        """The share of the way that calibration goes, once that is decided."""
        return CALIBRATIONS.get(self.calibrate, self.calibrate)

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the settings on which held-out conditions decide."""
        return tuple(name for name in ("calibrate", "control_start") if getattr(self, name) == "auto")

    def change(self, changes: Mapping[str, Any]) -> "SamplingSettings":
        """The same settings with some changed; ``solver`` is a mapping of changes itself. ``None`` changes nothing.

        Raises
        ------
        InputError
            If a name is unknown, or a value is out of range.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        solver = {name: value for name, value in (given.pop("solver", None) or {}).items() if value is not None}
        known = [field.name for field in fields(self)]
        if unknown := [name for name in given if name not in known]:
            raise InputError(
                f"a prediction cannot change model.sampler.{unknown[0]}; it can change "
                f"{', '.join(f'model.sampler.{name}' for name in known)}"
            )
        try:
            return replace(self, solver=replace(self.solver, **solver), **given)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.sampler: {error}") from error
