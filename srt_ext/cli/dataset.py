"""``srt-ext features --engine ray``: the features of a data set, by Ray Data."""

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
from ..ray.sink import PENDING, FieldSink, Written, forget_failures, remove_uncommitted
from ..ray.sources import Pictures, Source, read_bytes
from . import common
from .common import OutputError
from .features import Request
from .folder import lock_folder
from .plan import TIMED, print_plan

SEED = 0  # of the sample that the basis is fitted on
COMPLETE = "complete.json"
REASONS = 10  # that are printed


class Cluster(NamedTuple):
    """Where to run: ``address`` of a Ray cluster, or None for one on this machine."""

    address: str | None
    actors: int | None
    batch: int | None  # pictures of a task
    rows_per_file: int | None


class Job(NamedTuple):
    """What to extract. ``arguments`` are those of Features but for the basis."""

    source: Source
    arguments: dict[str, Any]
    settings: dict[str, str]
    components: int | np.ndarray | None  # their number, or those of another output: [K, C]


class Output(NamedTuple):
    """A folder of any file system."""

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
        count, exact = source.count()
        print_plan(count, exact, _count_done(out), settings, _sizes(job))
    else:
        _write(job, out, cluster, retry_failed)


def _parse_pca(pca: str | None) -> int | np.ndarray | None:
    if pca is None:
        return None
    if not pca.isdecimal():
        return read_components(*filesystem(pca))
    if int(pca) < 1:
        raise common.fatal(f"--pca must be at least 1; got {pca}")
    return int(pca)


def _check_channels(job: Job, components: np.ndarray) -> None:
    """Or every picture would fail."""
    for channels in Features(**job.arguments)(job.source.sample(1, SEED))["channels"].to_pylist():
        if channels not in (None, components.shape[1]):
            rule = f"the {channels} channels of the model"
            raise common.fatal(f"--pca must have {rule}; got those of {components.shape[1]}")


def _name_of(components: int | np.ndarray | None) -> str:
    """For the settings."""
    if isinstance(components, np.ndarray):
        return f"{len(components)} of {hashlib.sha256(components.tobytes()).hexdigest()[:16]}"
    return "none" if components is None else str(components)


def _sizes(job: Job) -> Iterator[int | None]:
    """Extracts a few pictures and yields the bytes of the features of each; None if it failed."""
    extract = Features(**job.arguments)
    sample = job.source.sample(1 + TIMED, SEED)
    for row in range(sample.num_rows):
        (result,) = extract(sample.slice(row, 1)).to_pylist()
        if result["reason"] is not None:
            yield None
            continue
        stored = job.components if job.components is not None else result["channels"]
        share = (stored if isinstance(stored, int) else len(stored)) / result["channels"]
        yield int(len(result["field"]) * share) + len(result["prefix"] or b"")


def _write(job: Job, out: Output, cluster: Cluster, retry_failed: bool) -> None:
    """Writes the features of the pictures that are not done, with Ray's progress bars.

    Raises an OutputError if ``out`` has features of other settings, before any work; typer.Exit if
    pictures failed or the run was interrupted.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        if isinstance(out.files, pyarrow.fs.LocalFileSystem):
            stack.enter_context(lock_folder(Path(out.path)))
        started = _check_settings(job, out)
        for message in job.source.errors:
            common.error(message)
        if job.source.skipped:
            common.echo(f"left out: {job.source.skipped}")
        finished, this = _read_complete(out), job.source.fingerprint()
        if retry_failed:
            forget_failures(out.files, out.path)
        elif started and finished.get("source") == this:
            common.echo(f"nothing left to do: {finished['done']} pictures are done in {out.name}")
            return
        done = _count_done(out)
        stack.enter_context(_ray_errors())
        placement = stack.enter_context(_placement(cluster))
        remove_uncommitted(out.files, out.path)
        basis = _basis(job, out, {**placement, "batch_size": 1}, started)
        write_settings(job.settings, out.files, out.path)
        sink = FieldSink(out.path, out.files, cluster.rows_per_file)
        arguments = {**job.arguments, "pca": basis}
        batch = cluster.batch or _batch_size(job.arguments)
        _run(job.source, out, sink, arguments, {**placement, "batch_size": batch})
        done_now = done + sink.total.pictures + sink.total.failed
        complete = json.dumps({"source": this, "done": done_now}).encode()
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
    """The pipeline. ``arguments``: of Features. ``placement``: of its actors."""
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        ID,
        out.file("checkpoint"),
        delete_checkpoint_on_success=False,
        override_filesystem=out.files,
    )
    try:
        pictures = ray.data.read_datasource(Pictures(source))
        # Blocks are units of work: what is computed again if an actor is lost.
        blocks = pictures.repartition(target_num_rows_per_block=placement["batch_size"])
        # Another share of a CPU keeps it apart from the actors, which then wait for no file.
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
        f"{written.pictures} pictures written, {written.failed} failed, {done} done before",
        *[f"all reasons are in {out.name.rstrip('/')}/errors"] * bool(written.failed),
        f"{written.bytes / 1e9:.2f} GB in {seconds:.1f} s",
        f"wrote to {out.name}",
    )


def _batch_size(arguments: dict[str, Any]) -> int:
    """16, or fewer whose fields may take 256 MB in float32, for a model of 768 channels."""
    cells = ((arguments["size"] or 1024) / arguments["stride"]) ** 2
    return min(16, max(1, int(2**28 / (cells * 768 * 4))))


# ---- the cluster --------------------------------------------------------------------------------


@contextmanager
def _placement(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Connects to Ray and yields how the actors that hold the model are placed."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    cores = len(os.sched_getaffinity(0))
    connected = ray.is_initialized()
    if not connected:
        here: dict[str, Any] = {"num_cpus": cores + 2, "include_dashboard": False}
        ray.init(
            address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else here)
        )
    # Plans are not logged; progress is, where there is no terminal for bars.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.INFO)
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        # A quarter for what reads and writes, which mostly waits; here that is added.
        cpus = cpus * 3 // 4 if address or connected else cores
        actors = cluster.actors or gpus or max(1, cpus // 2)
        share: dict[str, Any] = {"num_cpus": max(1, cpus // actors)}
        if gpus:
            share["num_gpus"] = min(1, gpus / actors)
        yield {"compute": ActorPoolStrategy(size=actors), **share}
    finally:
        if not connected:
            ray.shutdown()


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Reports what ends a job in one line."""
    try:
        yield
    except KeyboardInterrupt:
        common.error("interrupted; the same command resumes")
        raise typer.Exit(130) from None
    except ExecutionTimeoutError as error:  # after 30 minutes; it starts a process again each time
        raise common.fatal(
            "Ray ended the job: it made no progress. If processes that hold the model die, too "
            "little memory is likely: use a smaller --batch or --size, or fewer --actors"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise common.fatal(f"Ray ended the job: {describe(cause)}") from error


# ---- the output ---------------------------------------------------------------------------------


def _check_settings(job: Job, out: Output) -> bool:
    """Whether ``out`` was started before; an OutputError if it was with other settings."""
    before = read_settings(out.files, out.path)
    if before is None:
        return False
    if others := common.other_settings(before, job.settings):
        raise OutputError(
            f"{out.name} was made with other settings ({others}): choose another --output"
        )
    return True


def _count_done(out: Output) -> int:
    """Pictures whose write is committed, with a field or a reason."""
    folder = pyarrow.fs.FileSelector(out.file("checkpoint"), allow_not_found=True)
    names = [f.path for f in out.files.get_file_info(folder) if not f.path.endswith(PENDING)]
    with ThreadPoolExecutor(16) as pool:
        metadata = pool.map(lambda name: read_metadata(name, filesystem=out.files), names)
        return sum(file.num_rows for file in metadata)


def _read_complete(out: Output) -> dict[str, Any]:
    """The source and the number of pictures of a run that ended; empty if none did."""
    try:
        with out.files.open_input_stream(out.file(COMPLETE)) as file:
            complete: dict[str, Any] = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return {}
    return complete


def _basis(job: Job, out: Output, placement: dict[str, Any], started: bool) -> np.ndarray | None:
    """[K, C] of --pca; fitted and written before the first field."""
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
