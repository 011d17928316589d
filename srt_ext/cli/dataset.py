"""``srt-ext features --engine ray``: the features of a data set, with Ray Data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.fs
import ray
import typer
from pyarrow.parquet import read_metadata
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from .._messages import describe
from ..data import (
    COMPONENTS,
    THREADS,
    filesystem,
    read_components,
    read_settings,
    write_components,
    write_file,
    write_settings,
)
from ..ray.features import Features
from ..ray.pca import PICTURES, Cells, fit
from ..ray.rows import BYTES, ID
from ..ray.sink import COMPLETE, PENDING, FieldSink, Written, forget_failures, remove_uncommitted
from ..ray.sources import Pictures, Source, read_bytes
from . import common
from .common import OutputError
from .features import Request
from .plan import TIMED, print_plan

SEED = 0  # of the sample to which the basis is fitted
REASONS = 10  # reasons of failures that are printed
FREE = 2  # CPUs that the actors leave to Ray's checkpoint filter and to other tasks


class Cluster(NamedTuple):
    """The cluster: ``address`` of a Ray cluster, or None for a temporary one on this machine."""

    address: str | None
    actors: int | None
    batch: int | None  # images per task
    rows_per_file: int | None


class Job(NamedTuple):
    """The work. ``arguments``: of Features, without ``pca``."""

    source: Source
    arguments: dict[str, Any]
    settings: dict[str, str]
    components: int | np.ndarray | None  # number, or components [K, C] of another output


class Output(NamedTuple):
    """A folder on any file system."""

    name: str  # as the user wrote it
    files: pyarrow.fs.FileSystem
    path: str

    def file(self, name: str) -> str:
        return posixpath.join(self.path, name)


def extract(
    source: Source,
    output: str,
    request: Request,
    cluster: Cluster,
    pca: str | None,
    dry_run: bool,
    retry_failed: bool,
) -> None:
    """Runs the command. ``pca``: a number of components, or the pca.npy of another output."""
    out = Output(output, *filesystem(output))
    if "?" in out.path:  # Ray would parse the rest as a query
        raise common.fatal(f"--output must not contain a ?; got {output}")
    if "memory" in out.files.type_name:
        raise common.fatal(f"--output must be accessible to all processes; got {output}")
    components = _parse_pca(pca)
    network, _, size, _, settings = request.load()
    settings = {**settings, "pca": _name_of(components)}
    arguments = {
        "column": BYTES,
        "model": network.model,
        "mean": network.mean,
        "std": network.std,
        "layer": request.layer,
        "size": size,
        "dtype": request.dtype.value,
        **request.srt_arguments(),
    }
    job = Job(source, arguments, settings, components)
    if isinstance(components, np.ndarray):
        _check_channels(job, components)
    if dry_run:
        _check_settings(job, out)
        count, exact = source.count()
        print_plan(count, exact, _count(out, "checkpoint"), settings, _sizes(job))
    else:
        _write(job, out, cluster, retry_failed)


def _parse_pca(pca: str | None) -> int | np.ndarray | None:
    if pca is None:
        return None
    if not pca.isdecimal():
        try:
            return read_components(*filesystem(pca))
        except OSError as error:
            rule = "--pca must be a number of components or an existing .npy file"
            raise common.fatal(f"{rule}; got {pca} ({error})") from None
    if int(pca) < 1:
        raise common.fatal(f"--pca must be at least 1; got {pca}")
    return int(pca)


def _check_channels(job: Job, components: np.ndarray) -> None:
    """Checks the channels of components; otherwise every image would fail."""
    table = Features(**job.arguments)(job.source.sample(1, SEED, quick=True))
    for channels in table["channels"].to_pylist():
        if channels not in (None, components.shape[1]):
            rule = f"--pca must have {channels} channels, like the features of the model"
            raise common.fatal(f"{rule}; got {components.shape[1]}")


def _name_of(components: int | np.ndarray | None) -> str:
    """The components as a value in the settings."""
    if isinstance(components, np.ndarray):
        return f"{len(components)} of {hashlib.sha256(components.tobytes()).hexdigest()[:16]}"
    return "none" if components is None else str(components)


def _sizes(job: Job) -> Iterator[int | None]:
    """Extracts a few images and yields the bytes of their features; None if an image failed."""
    extract = Features(**job.arguments)
    sample = job.source.sample(1 + TIMED, SEED, quick=True)
    for row in range(sample.num_rows):
        (result,) = extract(sample.slice(row, 1)).to_pylist()
        if result["reason"] is not None:
            yield None
            continue
        stored = job.components if job.components is not None else result["channels"]
        share = (stored if isinstance(stored, int) else len(stored)) / result["channels"]
        yield int(len(result["field"]) * share) + len(result["prefix"] or b"")


def _write(job: Job, out: Output, cluster: Cluster, retry_failed: bool) -> None:
    """Writes the features of the unfinished images, with Ray's progress bars.

    Raises an OutputError if ``out`` has features of other settings, before any work; typer.Exit if
    images failed or the run was interrupted.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        if isinstance(out.files, pyarrow.fs.LocalFileSystem):
            stack.enter_context(common.lock_folder(Path(out.path)))
        started = _check_settings(job, out)
        for message in job.source.errors:
            common.error(message)
        if job.source.skipped:
            common.echo(f"ignored: {job.source.skipped}")
        finished, this = _read_complete(out), job.source.fingerprint()
        if started and finished.get("source") == this and not retry_failed:
            failed = finished["failed"]
            hint = "; use --retry-failed to retry them" if failed else ""
            common.echo(
                f"nothing left to do: {finished['done'] - failed} images are in {out.name}, "
                f"{failed} failed{hint}"
            )
            return
        stack.enter_context(_ray_errors())
        placement = stack.enter_context(_placement(cluster))
        for folder in ("data", "errors"):
            out.files.create_dir(out.file(folder), recursive=True)
        remove_uncommitted(out.files, out.path)
        if retry_failed:
            forget_failures(out.files, out.path)
        done = _count(out, "checkpoint")
        basis = _basis(job, out, {**placement, "batch_size": 1}, started)
        write_settings(job.settings, out.files, out.path)
        sink = FieldSink(out.path, out.files, cluster.rows_per_file)
        arguments = {**job.arguments, "pca": basis}
        batch = cluster.batch or _batch_size(job.arguments)
        _run(job.source, out, sink, arguments, {**placement, "batch_size": batch})
        counts = {"done": _count(out, "checkpoint"), "failed": _count(out, "errors")}
        complete = json.dumps({"source": this, **counts}).encode()
        write_file(out.files, out.path, COMPLETE, lambda file: file.write(complete))
    _report(sink.total, done, out, time.perf_counter() - start)
    if sink.total.failed or job.source.errors:
        raise typer.Exit(1)


def _run(
    source: Source,
    out: Output,
    sink: FieldSink,
    arguments: dict[str, Any],
    placement: dict[str, Any],
) -> None:
    """Runs the pipeline. ``arguments``: of Features. ``placement``: of its actors."""
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        ID,
        out.file("checkpoint"),
        delete_checkpoint_on_success=False,
        override_filesystem=out.files,
    )
    try:
        pictures = ray.data.read_datasource(Pictures(source))
        # A block is the unit of work: it is computed again if an actor is lost.
        blocks = pictures.repartition(target_num_rows_per_block=placement["batch_size"])
        # Ray fuses steps with equal resources. Separate from the actors, files are read ahead.
        loaded = blocks.map_batches(
            read_bytes, batch_format="pyarrow", batch_size=None, num_cpus=0.5
        )
        fields = loaded.map_batches(
            Features,
            fn_constructor_kwargs=arguments,
            batch_format="pyarrow",
            **placement,
        )
        fields.write_datasink(sink)
    finally:
        context.checkpoint_config = None


def _report(written: Written, done: int, out: Output, seconds: float) -> None:
    for reason in written.reasons[:REASONS]:
        common.error(reason)
    common.echo(
        f"{written.pictures} images written, {written.failed} failed, {done} already done",
        *[f"the reasons of all failures are in {out.name.rstrip('/')}/errors"]
        * bool(written.failed),
        f"{written.bytes / 1e9:.2f} GB in {seconds:.1f} s",
        f"wrote to {out.name}",
    )


def _batch_size(arguments: dict[str, Any]) -> int:
    """16, or fewer if their fields exceed 256 MB, in float32 with the channels of a ViT-B."""
    cells = ((arguments["size"] or 1024) / arguments["stride"]) ** 2
    return min(16, max(1, int(2**28 / (cells * 768 * 4))))


# ---- the cluster --------------------------------------------------------------------------------


@contextmanager
def _placement(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Connects to Ray and yields the placement of the actors that hold the model."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    connected = ray.is_initialized()
    if not connected:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            cores = len(os.sched_getaffinity(0))
            cpus = cpus_for(max(cores, cluster.actors or 1))
            quiet |= {"num_cpus": cpus, "include_dashboard": False}
        ray.init(address or "local", **quiet)
    # Plans are not logged. Progress is logged if there is no terminal for bars.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.INFO)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        actors, share = place(nodes, cluster.actors)
        yield {"compute": ActorPoolStrategy(size=actors), **share}
    finally:
        if not connected:
            ray.shutdown()


def cpus_for(actors: int) -> int:
    """CPUs of a cluster on this machine. CPUs in addition to the actors' mostly wait."""
    return actors + max(FREE, -(-actors // 3))


def place(nodes: list[dict[str, float]], actors: int | None) -> tuple[int, dict[str, float]]:
    """The number of actors and the resources of each, for the resources of the nodes.

    The actors leave a quarter of the CPUs free, at least FREE. Each actor fits on one node. Raises
    a ValueError if there are too many actors.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    every = [int(node.get("CPU", 0)) for node in nodes]
    with_gpu = [cpu for cpu, node in zip(every, nodes, strict=True) if node.get("GPU", 0) >= 1]
    cpus = [cpu - cpu // 4 for cpu in (with_gpu if gpus else every)]
    largest = cpus.index(max(cpus))
    cpus[largest] -= max(0, FREE - (sum(every) - sum(cpus)))
    wanted = actors or gpus or max(1, sum(cpus) // 2)
    fits = [n for n in range(1, cpus[largest] + 1) if sum(cpu // n for cpu in cpus) >= wanted]
    if not fits:
        rule = f"{max(0, sum(cpus))}, the number of CPUs not used for reading and writing"
        raise ValueError(f"--actors must be at most {rule}; got {wanted}")
    share: dict[str, float] = {"num_cpus": max(fits)}
    if gpus:
        share["num_gpus"] = 1 / -(-wanted // gpus)
    return wanted, share


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Reports the reason why a job ends as one line."""
    try:
        yield
    except KeyboardInterrupt:
        common.error("interrupted; run the same command again to resume")
        raise typer.Exit(130) from None
    except ExecutionTimeoutError as error:  # after 30 minutes of restarting processes
        raise common.fatal(
            "Ray ended the job because it made no progress. If processes that hold the model die, "
            "memory is probably insufficient: use a smaller --batch or --size, or fewer --actors"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise common.fatal(f"Ray ended the job: {describe(cause)}") from error


# ---- the output ---------------------------------------------------------------------------------


def _check_settings(job: Job, out: Output) -> bool:
    """Whether ``out`` was started before. Raises an OutputError if its settings differ."""
    before = read_settings(out.files, out.path)
    if before is None:
        return False
    if others := common.other_settings(before, job.settings):
        raise OutputError(
            f"{out.name} was written with other settings ({others}): choose another --output"
        )
    return True


def _count(out: Output, folder: str) -> int:
    """The number of rows of the files in a folder, without uncommitted writes."""
    selector = pyarrow.fs.FileSelector(out.file(folder), allow_not_found=True)
    paths = [file.path for file in out.files.get_file_info(selector)]
    with ThreadPoolExecutor(THREADS) as pool:
        names = [path for path in paths if not path.endswith(PENDING)]
        metadata = pool.map(lambda name: read_metadata(name, filesystem=out.files), names)
        return sum(file.num_rows for file in metadata)


def _read_complete(out: Output) -> dict[str, Any]:
    """The source and the number of images of a finished run; empty if no run has finished."""
    try:
        with out.files.open_input_stream(out.file(COMPLETE)) as file:
            complete: dict[str, Any] = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return {}
    return complete


def _basis(job: Job, out: Output, placement: dict[str, Any], started: bool) -> np.ndarray | None:
    """The components [K, C] of --pca, fitted and written before the first field."""
    if job.components is None:
        return None
    if started:
        return read_components(out.files, out.file(COMPONENTS))
    components = job.components
    if isinstance(components, int):
        sample = job.source.sample(PICTURES, SEED)
        blocks = ray.data.from_arrow(sample, override_num_blocks=max(1, sample.num_rows))
        cells = blocks.map_batches(
            Cells,
            fn_constructor_kwargs={**job.arguments, "dtype": "float32"},
            batch_format="pyarrow",
            **placement,
        )
        components = fit(cells.take_all(), components)
    write_components(components, out.files, out.path)
    return components
