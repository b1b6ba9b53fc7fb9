"""The options of `train`: flags over a file over defaults, all of them from the dataclasses of training/config.py."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import UNSET, Parameter

from triton_lstm.settings import UsageError, device_for
from triton_lstm.system.terminal import sentence
from triton_lstm.training.checkpoint import State, check_files, read_state
from triton_lstm.training.config import (
    CHANGEABLE,
    ON_CPU,
    Config,
    Data,
    Execution,
    Model,
    Optimizer,
    Output,
    differences,
    for_file,
)
from triton_lstm.training.processes import Processes
from triton_lstm.training.run_folder import RunFolder, existing_run, step_of

RUNS = Path("runs")
OWN = ("config", "folder", "resume", "resume-or-start", "compare", "help")  # of the command line only


@dataclasses.dataclass
class Options:
    """What the command line asks for.

    path: of the run's folder. folder, checkpoint, state, advice: with --resume, the run to continue, its last
    checkpoint, that one's state, and what to do if it is damaged. repeated: the same command may have run before, and
    may have completed the run.
    """

    config: Config
    path: Path | None
    compare: bool
    repeated: bool
    folder: RunFolder | None = None
    checkpoint: Path | None = None
    state: State | None = None
    advice: str = ""


def parse(arguments: Sequence[str], processes: Processes | None = None) -> Options | None:
    """The options, None if help was printed instead. Raises UsageError for anything that cannot be used.

    processes: of this run.
    """
    processes = processes or Processes()
    resumed: dict[str, Any] = {}

    def sources(app: cyclopts.App, commands: tuple[str, ...], found: cyclopts.ArgumentCollection) -> None:
        """Adds what the command line leaves open."""

        def value(name: str) -> str | None:
            tokens = found[name].tokens
            if not tokens:
                return None
            return str(tokens[-1].implicit_value) if tokens[-1].implicit_value is not UNSET else tokens[-1].value

        file, path, asked = value("--config"), value("--folder"), value("--resume-or-start") == "True"
        repeated = asked or processes.may_be_restarted
        if file is not None:
            _file(Path(file))(app, commands, found)
        if path is None and (asked or (repeated and value("--resume") != "True")):
            why = "--resume-or-start" if asked else "torchrun --max-restarts"
            raise UsageError(f"{why} has to find the run again. Add --folder FOLDER")
        folder = Path(path).expanduser() if path else None
        if value("--resume") == "True" or (repeated and folder and RunFolder(folder).steps()):
            resumed.update(_resumed(existing_run(folder, RUNS), processes, value("--device")))
            stored = for_file(resumed["state"]["config"])
            cyclopts.config.Dict(stored, source=str(resumed["folder"]))(app, commands, found)
        elif value("--device") != "cuda" and device_for(value("--device")).type == "cpu":
            preset = {name: default for section in ON_CPU.values() for name, default in section.items()}
            cyclopts.config.Dict(preset, source="the defaults without a GPU")(app, commands, found)

    app = cyclopts.App(
        name="triton-lstm train",
        help=_train.__doc__,
        version_flags=(),
        config=sources,
        default_parameter=Parameter(negative_iterable=(), consume_multiple=(1, 1 << 31), allow_repeating=True),
        result_action="return_value",
    )
    app.default(_train)
    try:
        options: Options | None = app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise UsageError(f"{_in_one_line(error)} See triton-lstm train --help") from None
    if options:
        options.config = _with_absolute_paths(options.config)
        options.repeated |= processes.may_be_restarted
        options = dataclasses.replace(options, **resumed)
        if options.state:
            _check_unchanged(options.state["config"], options.config)
    return options


def _resumed(folder: RunFolder, processes: Processes, device: str | None) -> dict[str, Any]:
    """The run to continue, on the device of that name or on its own, as fields of Options.

    Raises UsageError if its last checkpoint is damaged.
    """
    last = folder.steps()[-1]
    before = "Move it away to continue from the one before" if len(folder.steps()) > 1 else ""
    advice = before or "Start over without --resume"
    state = read_state(last, advice)
    device_for(device or state["config"].execution.device)  # before the check, in which PyTorch imports triton
    check_files(last, state, processes, advice)
    if step_of(last) != (step := state["step"]):
        raise UsageError(f"{last} was renamed: it is of step {step}. Give it that name again")
    return {"folder": folder, "checkpoint": last, "state": state, "advice": advice}


def _train(
    *,
    config: Path | None = None,
    folder: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    resume_or_start: Annotated[bool, Parameter(negative=())] = False,
    compare: Annotated[bool, Parameter(negative=())] = False,
    data: Annotated[Data, Parameter("*", group="Data")] = Data(),  # noqa: B008 - it is frozen
    model: Annotated[Model, Parameter("*", group="Model")] = Model(),  # noqa: B008
    optimizer: Annotated[Optimizer, Parameter("*", group="Optimizer")] = Optimizer(),  # noqa: B008
    execution: Annotated[Execution, Parameter("*", group="Execution")] = Execution(),  # noqa: B008
    output: Annotated[Output, Parameter("*", group="Output")] = Output(),  # noqa: B008
) -> Options:
    """Train a language model on text.

    Args:
        config: a YAML or TOML file with any of the options below, over which flags take precedence. The folder of every
            run has one, config.yaml.
        folder: of the run; without one, a new one in runs/, named by the time.
        resume: continue the run in --folder, or the one that saved last.
        resume_or_start: continue the run in --folder if it has a checkpoint, else start it: for a command that a
            scheduler repeats.
        compare: also train nn.LSTM on the same batches; exit 1 if the losses diverge.
    """
    whole = Config(data=data, model=model, optimizer=optimizer, execution=execution, output=output)
    return Options(whole, folder and folder.expanduser(), compare, resume_or_start)


def _file(path: Path) -> Any:
    """The source of --config."""
    kinds = {".yaml": cyclopts.config.Yaml, ".yml": cyclopts.config.Yaml, ".toml": cyclopts.config.Toml}
    if path.suffix not in kinds:
        raise UsageError(f"--config {path} must end in .yaml, .yml or .toml")
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read --config {path}: {getattr(error, 'strerror', error)}") from None
    try:
        content: Any = kinds[path.suffix](path, must_exist=True).config
    except Exception as error:  # those of two parsers, and of what they make of odd content
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise UsageError(f"--config {path}: {why}") from None
    return cyclopts.config.Dict(_checked(content, path), source=str(path))


def _checked(content: Any, path: Path) -> dict[str, Any]:
    """The content of a file without what is null. Raises UsageError unless it has options and their values."""
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: it must have options and their values, like `hidden: 512`")
    found: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise UsageError(f"--config {path}: a key must be the name of an option, got {str(key)[:40]}")
        name = key.replace("_", "-")
        if name in OWN:
            raise UsageError(f"--config {path}: {name} is for the command line only")
        if name in found:
            raise UsageError(f"--config {path}: {name} is given twice")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in items if value is not None):
            raise UsageError(f"--config {path}: {name} must be a value, or a list of values")
        found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _in_one_line(error: cyclopts.CycloptsError) -> str:
    """The message, with the nearest option's name, and without pydantic's layout."""
    if details := getattr(error.__cause__, "errors", None):
        first = details(include_url=False)[0]
        name = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        return f"{name}: {first['msg'].removeprefix('Value error, ').lower()}, got {str(first['input'])[:40]!r}."
    if isinstance(error, cyclopts.UnusedCliTokensError):
        return f"unexpected: {' '.join(error.unused_tokens or ())}. Options begin with two dashes."
    text = sentence(" ".join(str(error).split()))
    if isinstance(error, cyclopts.UnknownOptionError) and "Did you mean" not in text and error.argument_collection:
        names = [name for argument in error.argument_collection for name in argument.names]
        given = "--" + (error.token.keyword or error.token.value).strip("[]-").replace("_", "-")
        if near := difflib.get_close_matches(given, names, n=1):
            text += f" Did you mean {near[0]}?"
    return text


def _check_unchanged(stored: Config, wanted: Config) -> None:
    """Raises UsageError if a run cannot go on as it is wanted."""
    for section, name, old, new in differences(stored, wanted):
        if name not in CHANGEABLE[section]:
            flag = name.replace("_", "-")
            raise UsageError(
                f"the run was trained with --{flag} {_shown(old)}, not {_shown(new)}. Omit the option, or start over "
                "without --resume"
            )


def _shown(value: Any) -> str:
    return "off" if value is None else " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _with_absolute_paths(config: Config) -> Config:
    """So that a run can be continued from anywhere."""
    data = config.data
    tokenizer, cache = (None if path is None else _absolute(path) for path in (data.tokenizer, data.cache))
    text = tuple(map(_absolute, data.text))
    return dataclasses.replace(config, data=dataclasses.replace(data, text=text, tokenizer=tokenizer, cache=cache))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
