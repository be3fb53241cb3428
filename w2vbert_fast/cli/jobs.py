"""Options of the commands that run jobs. Nothing here imports torch: `--help` answers at once."""

# No `from __future__ import annotations`: typer reads the annotations of the commands.
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

INPUT_HELP = (
    "Files, folders, patterns such as 'calls/**/*.wav', WebDataset shards (.tar), or manifests "
    "(.jsonl, .csv, .tsv, .parquet) with a column audio_filepath."
)
JOB_HELP = (
    "Results go to tables in the folder, part-*; rows with errors to errors-*.jsonl. A command "
    "that was stopped, by whatever, goes on when it is given again. Exit status: 0 all went well, "
    "1 some rows failed, 2 the job did."
)
EMBED_HELP = "Write the hidden states of a layer for every recording.\n\n" + JOB_HELP
CLASSIFY_HELP = (
    "Write the class of every recording, the classes of its frames, or its x-vector, as the "
    "model's head has it.\n\n" + JOB_HELP
)

_BOOKS = ("shard_rows", "max_errors", "retry_errors", "overwrite", "log_json")
_OF_ENGINES = ("engine", "actors", "gpus_per_actor", "cpus_per_actor")
OF_JOBS = ("shard_rows", "max_errors", "retry_errors", "log_json", *_OF_ENGINES)
"""Options that mean nothing without a job's folder."""

OF_ALL_TASKS = ("max_seconds", "overlap_seconds", "vad")


def _option(kind: Any, default: Any, help_text: str, *names: str, **more: Any) -> tuple[Any, Any]:
    """An option's annotated type and its default."""
    import typer

    return Annotated[kind, typer.Option(*names, help=help_text, **more)], default


def _shared() -> dict[str, tuple[Any, Any]]:
    """Options of every job by name."""
    return {
        "formats": _option(
            list[str] | None,
            None,
            "jsonl or parquet; srt, vtt and txt of transcripts (json too, beside the recordings); "
            "npy or safetensors of embeddings. Can be repeated.",
            "--format",
            metavar="NAME",
        ),
        "max_seconds": _option(
            float, 300.0, "Recordings up to this length are computed whole, longer ones in chunks."
        ),
        "overlap_seconds": _option(
            float | None, None, "What neighbouring chunks have in common. Default: 4."
        ),
        "vad": _option(bool, False, "Cut long recordings at silences.", "--vad"),
        "frame_budget": _option(
            str, "auto", "20 ms frames in a batch; auto: found by a probe.", metavar="N|auto"
        ),
        "workers": _option(int | None, None, "Threads that decode. Default: the CPUs, at most 8."),
        "longest": _option(
            float | None,
            None,
            "Recordings of more seconds are errors. Default: 14400.",
            "--longest-seconds",
        ),
        "shard_rows": _option(int, 1000, "Rows of a table."),
        "max_errors": _option(int | None, None, "End the job when more rows have failed."),
        "retry_errors": _option(
            bool, False, "Do the rows again that have failed.", "--retry-errors"
        ),
        "overwrite": _option(
            bool, False, "Replace files, or another job's results in the folder.", "--overwrite"
        ),
        "log_json": _option(
            bool, False, "Report progress as JSON lines on standard error.", "--log-json"
        ),
        "engine": _option(
            str,
            "local",
            "ray: models live in the actors of a Ray cluster; the options below are for that.",
            metavar="local|ray",
        ),
        "actors": _option(
            str | None,
            None,
            "How many, or between how many. Default: from 1 to as many as there is room for.",
            metavar="N|MIN:MAX",
        ),
        "gpus_per_actor": _option(
            float | None, None, "Up to 1. Default: 1 where the cluster has GPUs, else 0."
        ),
        "cpus_per_actor": _option(float, 1.0, "Threads that decode, or compute without a GPU."),
    }


def with_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of jobs; it takes them as keyword arguments."""
    shared = _shared()
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in shared.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    kinds = {name: kind for name, (kind, _) in shared.items()}
    command.__annotations__ = {**command.__annotations__, **kinds}
    return command


def given_options(own: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    """Options that were given: those of `own` that are not None, and `shared` ones not as usual."""
    defaults = {name: default for name, (_, default) in _shared().items()}
    names = [name for name, value in own.items() if value is not None]
    # An option that can be repeated is an empty list where it is not given.
    names += [n for n, value in shared.items() if value != defaults[n] and value != []]
    flags = {"formats": "format", "longest": "longest-seconds"}
    return [f"--{flags.get(name, name).replace('_', '-')}" for name in names]


def register(
    app: "typer.Typer",
    report: Callable[[str], None],
    fail: Callable[[Exception], Any],
    dtypes: Any,
) -> None:
    """Add the commands `embed` and `classify` to a typer app.

    Args:
        app: the app.
        report: prints a message for the user.
        fail: reports an error that leaves nothing to do, and ends the program.
        dtypes: enumeration of the dtypes of weights.
    """
    import typer

    inputs_type = Annotated[list[str], typer.Argument(metavar="INPUT...", help=INPUT_HELP)]
    model_type = Annotated[str, typer.Option(metavar="PATH|HUB_ID", help="Folder or hub id.")]
    out_type = Annotated[str, typer.Option(metavar="DIR", help="Folder for results.")]
    device_type = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]
    dtype_type = Annotated[dtypes | None, typer.Option(help="Of the weights.")]

    @app.command("embed", short_help="Write hidden states of recordings.", help=EMBED_HELP)
    @with_job_options
    def embed_command(
        *,
        inputs: inputs_type,
        model: model_type,
        out: out_type,
        device: device_type = None,
        dtype: dtype_type = None,
        layer: Annotated[int, typer.Option(help="Index into hidden_states; -1: the last.")] = -1,
        stats: Annotated[
            str | None, typer.Option(metavar="FILE", help="Mean and variance to normalise with.")
        ] = None,
        pool: Annotated[str, typer.Option(metavar="mean|none", help="Over frames.")] = "none",
        embedding_dtype: Annotated[
            str, typer.Option(metavar="float32|float16", help="Of what is written.")
        ] = "float32",
        **shared: Any,
    ) -> None:
        options = {
            "model": model,
            "device": device,
            "dtype": None if dtype is None else dtype.value,
            "layer": layer,
            "stats": stats,
            "pool": pool,
            "embedding_dtype": embedding_dtype,
        }
        raise typer.Exit(start("embed", inputs, out, options, shared, report, fail))

    @app.command("classify", short_help="Write classes of recordings.", help=CLASSIFY_HELP)
    @with_job_options
    def classify_command(
        *,
        inputs: inputs_type,
        model: model_type,
        out: out_type,
        device: device_type = None,
        dtype: dtype_type = None,
        **shared: Any,
    ) -> None:
        options = {
            "model": model,
            "device": device,
            "dtype": None if dtype is None else dtype.value,
        }
        raise typer.Exit(start("classify", inputs, out, options, shared, report, fail))


def start(
    task: str,
    inputs: list[str],
    out: str,
    task_options: dict[str, Any],
    shared: dict[str, Any],
    report: Callable[[str], None],
    fail: Callable[[Exception], Any],
) -> int:
    """Run a job; the exit status.

    Args:
        task: "transcribe", "embed" or "classify".
        inputs: files, folders, patterns, tar files and manifests.
        out: the job's folder.
        task_options: of the task alone, with its model, device and dtype.
        shared: the options of `with_job_options`.
        report: prints a message for the user.
        fail: reports an error that leaves nothing to do, and ends the program.
    """
    try:
        from w2vbert_fast.cli.running import run_job

        return run_job(
            task,
            inputs,
            out,
            task_options={**task_options, **{name: shared[name] for name in OF_ALL_TASKS}},
            formats=shared["formats"] or (),
            frame_budget=shared["frame_budget"],
            workers=shared["workers"],
            longest=shared["longest"],
            job_options={name: shared[name] for name in _BOOKS},
            report=report,
            **_engine(shared, task_options["device"]),
        )
    except (OSError, RuntimeError, ValueError, TypeError, ImportError, MemoryError) as error:
        fail(error)
        return 2


def _engine(shared: dict[str, Any], device: str | None) -> dict[str, Any]:
    """What makes `run_job` run a job on another engine than its own."""
    own = {name: shared[name] for name in _OF_ENGINES[1:]}
    engine = shared["engine"]
    if engine == "local":
        for option in given_options({}, own):
            raise ValueError(f"{option} is for --engine ray")
        return {}
    if engine != "ray":
        raise ValueError(f"--engine must be local or ray, got {engine!r}")
    if device is not None:
        raise ValueError("--device is for --engine local; with ray there is --gpus-per-actor")
    from w2vbert_fast.integrations.ray import job_runner

    return {
        "make_runner": functools.partial(
            job_runner,
            num_gpus=own["gpus_per_actor"],
            num_cpus=own["cpus_per_actor"],
            concurrency=_actors(own["actors"]),
        )
    }


def _actors(text: str | None) -> int | tuple[int, int] | None:
    """A number of actors, or the fewest and the most."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--actors must be a number or MIN:MAX, got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
