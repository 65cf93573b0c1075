"""The command that trains from a converted checkpoint in MaxText."""

from maxconv.config.tables import defaults
from maxconv.jobs.prepare import Job
from maxconv.targets import place
from maxconv.targets.repository import is_repository, repository_name
from maxconv.text import argument

PROGRAM = "python -m maxtext.trainers.pre_train.train"


def training_command(job: Job) -> str | None:
    """The command, with every argument that the checkpoint needs; None for an adapter alone.

    Those of the run are left to the user: data, steps, where to write.
    """
    if job.training is None:
        return None
    parallelism = {k: n for k, n in job.config.parallelism.items() if n != defaults()[k]}
    told = [
        argument(key, value) for key, value in {**job.training.arguments, **parallelism}.items()
    ]
    directory = job.config.base_output_directory
    if not is_repository(directory):
        return " ".join([PROGRAM, *told, argument("load_parameters_path", job.items)])
    download = f"hf download {repository_name(directory)} --local-dir DIR"
    loaded = f'load_parameters_path="$PWD"/{place.items("DIR")}'
    return " ".join([f"{download} &&", PROGRAM, *told, loaded])
