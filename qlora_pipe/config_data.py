"""Settings of the data: which text is used for what, and how its records are read."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from qlora_pipe.config_section import Section


class Dataset(Section):
    """A text or a set of records, read as data, never executed."""

    source: str = Field(description="a file, or package:NAME:PATH for a file inside an installed package")
    format: Literal["templates", "alpaca", "messages"] = Field(
        "templates",
        description="of the records; templates: those below, or none for one text; alpaca: fields instruction, input "
        "and output; messages: a chat, a field messages of {role, content}, every answer of which is scored",
    )
    prompt: str | None = Field(None, description="template of the user turn, e.g. 'Tell me about {title}.'")
    response: str | None = Field(None, description="template of the answer; only its tokens are scored")
    text: str | None = Field(None, description="template of a plain-text record; none: the file is one text")
    exclude: tuple[str, ...] = Field(
        (), description="records whose first field, of the templates or alpaca, is one of these go"
    )
    heldout: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the records (or of the end of the text) kept for evaluation"
    )

    @model_validator(mode="after")
    def _templates_agree(self) -> "Dataset":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: give both, or neither")
        if self.prompt is not None and self.text is not None:
            raise ValueError("give prompt and response, or text, not all three")
        if self.format != "templates" and (self.prompt is not None or self.text is not None):
            raise ValueError(f"format: {self.format} has its own fields: leave out the templates, or the format")
        if self.format == "messages" and self.exclude:
            raise ValueError("exclude is of records with a first field; format: messages has none: leave it out")
        return self

    @property
    def is_text(self) -> bool:
        """Whether the file is one text, not records."""
        return self.format == "templates" and self.prompt is None and self.text is None


def _dataset_shorthand(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


DatasetField = Annotated[Dataset, BeforeValidator(_dataset_shorthand, json_schema_input_type=str | Dataset)]


TASK = "task"
"""Name of the task's own held-out text in every table."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Data(Section):
    """What text is used for what."""

    calibration: DatasetField = Field(description="generic text for the calibration pass")
    task: DatasetField = Field(description="what the adapter is trained on, and held-out rows of it")
    evaluation: dict[Name, DatasetField] = Field(
        default_factory=dict, description="further texts to measure perplexity on, by name; whole unless heldout is set"
    )

    @field_validator("evaluation")
    @classmethod
    def _whole_texts(cls, value: dict[str, Dataset]) -> dict[str, Dataset]:
        if TASK in value:
            raise ValueError(f"{TASK} is the name of the task's own held-out rows; choose another")
        return {
            name: text if "heldout" in text.model_fields_set else text.model_copy(update={"heldout": 1.0})
            for name, text in value.items()
        }
