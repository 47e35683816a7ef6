"""What surrounds the work of a job: its log, its own process, what it cost."""

import contextlib
import platform
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from cupel.devices import pick_device
from cupel.locks import at_work
from cupel.registry import load_plugins


@contextlib.contextmanager
def logged(path: str | Path) -> Iterator[None]:
    """Send what is printed to a log file as well as any error, and keep the console for the scheduler."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", buffering=1, encoding="utf-8") as file, at_work():
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except BaseException:
                traceback.print_exc()
                raise


@contextlib.contextmanager
def running(job) -> Iterator[str]:
    """As `logged`, with plugins loaded, on a device that is claimed: `cpu` or `cuda`, see `cupel.devices.pick_device`.

    Device and plugins are read from Snakemake's `job.config`: as parameters of the rule they would belong to what a result is.
    """
    with logged(job.log[0]):
        load_plugins(job.config["plugins"])
        yield pick_device(job.config["device"], job.resources.gpu, job.resources.vram_mb)


def data_of(job, family: str) -> str:
    """Folder of the prepared data of a family."""
    return f"{job.config['data']['folder']}/{family}"


def texts_of(job) -> dict[str, str]:
    """Folders of the prepared texts that a job names in its parameter `data`."""
    return {name: f"{data_of(job, 'text')}/{name}" for name in job.params.data}


def sources_of(job) -> dict:
    """Where raw files come from, as the functions that prepare data take it."""
    return {"kinds" if key == "sources" else key: job.config["data"][key] for key in ("sources", "cache", "mirror")}


def separately(function: Callable, *arguments) -> None:
    """Call a stage in a forked child, so that its peak memory and its random state are its own, and nothing is imported twice.

    With a CUDA device, which does not outlive a fork, the stage runs here.

    Raises:
        RuntimeError: the child failed; it has printed its traceback.
    """
    import multiprocessing

    if "cuda" in arguments:
        function(*arguments)
        return
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {child.exitcode}")


def costs() -> dict[str, float]:
    """Peak resident memory of this process, and of the device, in MB; threads."""
    import torch

    unit = 1024 if platform.system() == "Linux" else 1024**2
    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "peak_vram_mb": device,
            "threads": torch.get_num_threads()}
