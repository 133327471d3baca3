"""The one tree of errors a user can meet.

Every message says what was expected, what was found and what to do next. The command line prints the message
as one paragraph and exits with code 2; anything outside this tree is a bug of ours.

    QloraPipeError
    |- ConfigError            the YAML file or a --set override
    |- SourceError            the model or an adapter: missing, truncated, of an unknown kind
    |  |- UnsupportedModel    a family, layer or feature that is not understood
    |  `- WeightError         a tensor: wrong dtype or shape, NaN or Inf
    |- DataError              a text or instruction set: missing, empty, too short
    |- BudgetError            a byte budget below what is possible
    |- PlanError              the plan does not fit, or an output differs from its plan
    |- ArtifactError          a run folder: corrupt, half-written, of another schema
    |- DeviceError            a device that is not present
    `- StageError             a stage that cannot go on (NaN loss, disk full)
"""


class QloraPipeError(Exception):
    """Base of every error raised for something the user can change."""


class ConfigError(QloraPipeError):
    """The configuration is not valid."""


class SourceError(QloraPipeError):
    """The model, or an adapter of one, cannot be found or read."""


class UnsupportedModel(SourceError):
    """The model has a family, layer or feature that the architecture description does not cover."""


class WeightError(SourceError):
    """A tensor has the wrong dtype or shape, or holds NaN or Inf."""


class DataError(QloraPipeError):
    """A data set is missing, empty or too short."""


class BudgetError(QloraPipeError):
    """The byte budget is below the smallest model that can be built."""


class PlanError(QloraPipeError):
    """The plan does not fit the stated memory, or what was written differs from the plan."""


class ArtifactError(QloraPipeError):
    """An artifact is missing, half-written, corrupt or of an unknown schema."""


class DeviceError(QloraPipeError):
    """The requested device is not present."""


class StageError(QloraPipeError):
    """A stage cannot go on."""
