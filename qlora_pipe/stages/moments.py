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
    covariance and its factorisations, which are kept until another input is asked for.

    Peak bytes: two inputs' covariances in fp32 and their factorisations in fp64.
    """

    def __init__(self, context: Context) -> None:
        self.settings = context.config.decompose
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
        return None if self.settings.rounding == "nearest" else self.feedback(layer, role, choices)

    def feedback(self, layer: int, role: str, choices: Iterable[Choice]) -> dict[int | None, Feedback]:
        """The same however `decompose` rounds."""
        covariance = self.covariance(layer, role)
        transposed = PRUNED_AXIS[role] == "columns"
        for block in {None if transposed else choice.block_size for choice in choices} - set(self._feedback):
            self._feedback[block] = feedback(covariance, block, self.settings.damping)
        return self._feedback

    def covariance(self, layer: int, role: str) -> Tensor:
        """Covariance of what the linear map of this role reads: fp32 [in, in], symmetric; ConfigError if calibration
        kept none."""
        if self._input != (layer, SITE[role]):
            name = covariance_name(layer, SITE[role])
            if name not in self._reader:
                raise ConfigError(f"calibrate.covariance is false, but {name} is needed; set it to true")
            self._input, self._feedback = (layer, SITE[role]), {}
            self._covariance = unpack_triangle(self._reader.read(name))
        return self._covariance
