"""What later stages read of the calibration."""

from torch import Tensor

from qlora_pipe.architectures import SITE, covariance_name
from qlora_pipe.errors import ConfigError
from qlora_pipe.stages.base import Context
from quant.moments import unpack_triangle


def covariance_of(context: Context, layer: int, role: str) -> Tensor:
    """Covariance of what the linear map of this role reads: fp32 [in, in], symmetric.

    Maps that read the same input share it. Raises ConfigError if calibration kept none. Peak bytes: three times the
    result's.
    """
    moments, name = context.reader("calibrate", "moments"), covariance_name(layer, SITE[role])
    if name not in moments:
        raise ConfigError(f"calibrate.covariance is false, but {name} is needed; set it to true")
    return unpack_triangle(moments.read(name))
