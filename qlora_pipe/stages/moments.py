"""What later stages read of the calibration."""

from collections.abc import Iterable

from torch import Tensor

from prune.groups import PRUNED_AXIS
from qlora_pipe.architectures import SITE, covariance_name, linear_name
from qlora_pipe.errors import ConfigError
from qlora_pipe.stages.base import Context
from quant.metric import Metric
from quant.moments import unpack_triangle
from quant.rounding import Feedback, feedback
from quant.storage import Choice


class Moments:
    """Metrics and rounding orders of linear maps, in the order of the model: maps that read the same input share its
    covariance and its factorisations, which are kept until another input is asked for. `pruned`: those of the small
    model's linear maps, the original's at the inputs that it keeps.

    Peak bytes: two inputs' covariances in fp32 and their factorisations in fp64.
    """

    def __init__(self, context: Context, *, pruned: bool = False) -> None:
        self.settings = context.config.decompose
        self._kept = context.index_map.kept_indices if pruned else None
        self._reader = context.reader("calibrate", "moments")
        self._input: tuple[int, str] | None = None
        self._feedback: dict[int | None, Feedback] = {}

    def metric(self, layer: int, role: str) -> Metric:
        """What an error of this map costs; raises ConfigError if calibration kept no covariance."""
        settings, name = self.settings, linear_name(layer, role)
        if settings.metric == "none":
            return Metric()
        outputs = self._reader.read(f"{name}.gradient").sqrt() if settings.loss_scale else None
        if settings.metric == "fisher":
            return Metric(outputs, self._reader.read(f"{name}.input").sqrt())
        return Metric(outputs, covariance=self.covariance(layer, role))

    def passing(self, layer: int, role: str, choices: Iterable[Choice]) -> dict[int | None, Feedback] | None:
        """How errors are passed on, by the columns that stay together in each of `choices`; None: they are not."""
        if self.settings.rounding == "nearest":
            return None
        transposed = PRUNED_AXIS[role] == "columns"
        for block in {None if transposed else choice.block_size for choice in choices}:
            self.feedback(layer, role, block)
        return self._feedback

    def feedback(self, layer: int, role: str, block: int | None) -> Feedback:
        """How errors are passed on where columns stay together in blocks of that many."""
        covariance = self.covariance(layer, role)
        if block not in self._feedback:
            self._feedback[block] = feedback(covariance, block, self.settings.damping)
        return self._feedback[block]

    def squares(self, layer: int, role: str) -> Tensor:
        """Mean square of every input of the linear map of this role: fp32 [in]."""
        found = self._reader.read(f"{linear_name(layer, role)}.input")
        return found if (kept := self._columns(layer, role)) is None else found[kept]

    def covariance(self, layer: int, role: str) -> Tensor:
        """Covariance of what the linear map of this role reads: fp32 [in, in], symmetric; ConfigError if calibration
        kept none."""
        if self._input != (layer, SITE[role]):
            name = covariance_name(layer, SITE[role])
            if name not in self._reader:
                raise ConfigError(f"calibrate.covariance is false, but {name} is needed; set it to true")
            self._input, self._feedback = (layer, SITE[role]), {}
            found = unpack_triangle(self._reader.read(name))
            self._covariance = found if (kept := self._columns(layer, role)) is None else found[kept][:, kept]
        return self._covariance

    def _columns(self, layer: int, role: str) -> Tensor | None:
        """Inputs that pruning leaves; None: all, or pruning is not asked about."""
        return None if self._kept is None or PRUNED_AXIS[role] == "rows" else self._kept(layer, role)
